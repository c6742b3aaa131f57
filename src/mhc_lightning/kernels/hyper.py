"""Mappings of the original Hyper-Connections (arXiv 2409.19606; eq. 5 of 2512.24880)."""

import torch
from torch import Tensor

from mhc_lightning.kernels.coefficients import compute_dtype
from mhc_lightning.kernels.record import StreamMappings


def hyper_mappings(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, tanh: bool = True, eps: float = 1e-20
) -> StreamMappings:
    """Compute the dynamic mappings of Hyper-Connections for every token.

    Each stream is normalised by itself and yields its own coefficients: with
    ``z[j] = act(streams[j] / rms(streams[j]) · phi)``,
    ``pre[j] = alpha[0] · z[j, 0] + b``, ``post[j] = alpha[1] · z[j, 1] + b`` and
    ``residual[i, j] = alpha[0] · z[j, 2 + i] + b``.

    Args:
        streams: [..., n, C].
        phi: [C, n + 2], columns in the order pre | post | residual.
        alpha: [2]: the scale of pre and residual, and the scale of post.
        bias: The static mappings [n² + 2n] in the order pre | post | residual (row-major).
        tanh: Whether ``act`` is tanh or the identity.
        eps: Added to the mean square, inside the square root.

    Returns:
        Mappings of leading shape ``streams.shape[:-2]``, float32 (float64 if any operand is).
    """
    n = streams.shape[-2]
    dtype = compute_dtype(streams, phi, alpha, bias)
    phi, alpha, bias = phi.to(dtype), alpha.to(dtype), bias.to(dtype)
    with torch.autocast(streams.device.type, enabled=False):
        wide = streams.to(dtype)
        inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        z = (wide @ phi) * inverse_rms
        z = torch.tanh(z) if tanh else z
        pre_bias, post_bias, residual_bias = bias.split([n, n, n * n])
        return StreamMappings(
            alpha[0] * z[..., 0] + pre_bias,
            alpha[1] * z[..., 1] + post_bias,
            alpha[0] * z[..., 2:].mT + residual_bias.view(n, n),
        )
