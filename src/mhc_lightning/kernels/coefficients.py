"""From streams to mappings: the projection of mHC (arXiv 2512.24880, eqs. 14–19), by hand.

Forward and backward are written out so that the streams are read as few times as plain matrix
products allow, and so that reading a sub-layer's input can share them (``read.py``). Coefficients
are stored [coefficient, tokens] here; the public functions return them per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mhc_lightning.kernels.record import StreamMappings
from mhc_lightning.kernels.sinkhorn import (
    check_iterations,
    sinkhorn_backward_tokens_last,
    sinkhorn_tokens_last,
)


class Projection(NamedTuple):
    """What the backward pass needs of the projection, besides streams and parameters.

    Attributes:
        raw: ``x · phi`` [n² + 2n, tokens], not yet divided by the norm (eq. 14).
        inverse_rms: [tokens] (eq. 15).
    """

    raw: Tensor
    inverse_rms: Tensor


class ParameterGrads(NamedTuple):
    """Gradients of phi, alpha and bias, and what the streams' gradient is made of.

    Attributes:
        phi: [n·C, n² + 2n] or None if not asked for.
        alpha: [3].
        bias: [n² + 2n].
        raw: Gradient of ``Projection.raw`` [n² + 2n, tokens].
        scale: [tokens]; the norm adds ``scale · x`` to the streams' gradient.
    """

    phi: Tensor | None
    alpha: Tensor
    bias: Tensor
    raw: Tensor
    scale: Tensor


def check_shapes(streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> None:
    """Raise ValueError unless the operands of ``stream_mappings`` fit each other."""
    n, width = streams.shape[-2:]
    coefficients = n * n + 2 * n
    for name, tensor, shape in (
        ("phi", phi, [n * width, coefficients]),
        ("alpha", alpha, [3]),
        ("bias", bias, [coefficients]),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for streams [..., {n}, {width}], not {list(tensor.shape)}"
            )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any operand is, float32 otherwise: coefficients are never of lower precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def project(flat: Tensor, phi: Tensor, eps: float) -> Projection:
    """Eqs. 14–15 on streams [tokens, n·C]; ``eps`` is added to the mean square."""
    mean_square = torch.linalg.vector_norm(flat, dim=1).square() / flat.shape[1]
    return Projection(phi.t() @ flat.t(), torch.rsqrt(mean_square + eps))


def logits_of(projection: Projection, alpha: Tensor, bias: Tensor, n: int) -> Tensor:
    """Eq. 16: the raw coefficients [n² + 2n, tokens] before σ, 2σ and Sinkhorn."""
    scale = _per_coefficient(alpha, n)
    return torch.addcmul(bias[:, None], projection.raw * scale[:, None], projection.inverse_rms)


def coefficients_of(logits: Tensor, n: int, num_iterations: int) -> StreamMappings:
    """Eqs. 17–19: mappings stored per token, contiguous."""
    tokens = logits.shape[1]
    pre = logits[:n].sigmoid().t().contiguous()
    post = logits[n : 2 * n].sigmoid().mul_(2).t().contiguous()
    matrices = sinkhorn_tokens_last(logits[2 * n :].reshape(n, n, tokens), num_iterations)
    return StreamMappings(pre, post, matrices.permute(2, 0, 1).contiguous())


def coefficients_backward(
    grads: StreamMappings,
    mappings: StreamMappings,
    flat: Tensor,
    projection: Projection,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    num_iterations: int,
    need_phi: bool,
) -> ParameterGrads:
    """Walk eqs. 19 to 14 back; ``grads`` and ``mappings`` are per token, ``flat`` [tokens, n·C]."""
    pre, post, _ = mappings
    tokens, n = pre.shape
    residual_logits = logits_of(projection, alpha, bias, n)[2 * n :].reshape(n, n, tokens)
    residual_grad = sinkhorn_backward_tokens_last(
        grads.residual.permute(1, 2, 0).contiguous(), residual_logits, num_iterations
    )
    logit_grad = torch.cat(
        [
            (grads.pre * pre * (1 - pre)).t(),
            (grads.post * post * (1 - post / 2)).t(),
            residual_grad.reshape(n * n, tokens),
        ]
    )
    scale = _per_coefficient(alpha, n)
    normed_grad = logit_grad * scale[:, None]
    alpha_terms = (logit_grad * projection.raw) @ projection.inverse_rms
    inverse_rms_grad = (normed_grad * projection.raw).sum(0)
    raw_grad = normed_grad * projection.inverse_rms
    return ParameterGrads(
        phi=(raw_grad @ flat).t() if need_phi else None,
        alpha=torch.stack([part.sum() for part in alpha_terms.split([n, n, n * n])]),
        bias=logit_grad.sum(1),
        raw=raw_grad,
        scale=projection.inverse_rms.pow(3) * inverse_rms_grad / -flat.shape[1],
    )


def _per_coefficient(alpha: Tensor, n: int) -> Tensor:
    return torch.cat([alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)])


class _StreamMappings(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, phi, alpha, bias, num_iterations, eps):  # type: ignore[no-untyped-def]
        n = streams.shape[-2]
        flat = streams.reshape(-1, phi.shape[0]).to(phi.dtype)
        projection = project(flat, phi, eps)
        mappings = coefficients_of(logits_of(projection, alpha, bias, n), n, num_iterations)
        ctx.save_for_backward(streams, phi, alpha, bias, *projection, *mappings)
        ctx.num_iterations = num_iterations
        return tuple(mappings)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        streams, phi, alpha, bias, raw, inverse_rms, *mappings = ctx.saved_tensors
        flat = streams.reshape(-1, phi.shape[0]).to(phi.dtype)
        parts = coefficients_backward(
            StreamMappings(*grads),
            StreamMappings(*mappings),
            flat,
            Projection(raw, inverse_rms),
            phi,
            alpha,
            bias,
            ctx.num_iterations,
            ctx.needs_input_grad[1],
        )
        streams_grad = None
        if ctx.needs_input_grad[0]:
            flat_grad = torch.addcmul(parts.raw.t() @ phi.t(), flat, parts.scale[:, None])
            streams_grad = flat_grad.to(streams.dtype).reshape(streams.shape)
        return streams_grad, parts.phi, parts.alpha, parts.bias, None, None


def stream_mappings(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    num_iterations: int = 20,
    eps: float = 1e-20,
) -> StreamMappings:
    """Compute one connection's mappings for every token (arXiv 2512.24880, eqs. 7–9 and 14–19).

    The n streams of a token are normalised together, ``x / sqrt(mean(x²) + eps)``, projected by
    ``phi``, scaled by ``alpha``, shifted by ``bias`` (order: pre | post | residual, row-major), and
    passed through σ, 2σ and Sinkhorn-Knopp.

    Args:
        streams: [..., n, C].
        phi: [n·C, n² + 2n].
        alpha: [3], the gates of pre, post and residual.
        bias: [n² + 2n].
        num_iterations: Sinkhorn iterations, at least 1.
        eps: Added to the mean square, inside the square root.

    Returns:
        Mappings of leading shape ``streams.shape[:-2]``, float32 (float64 if any operand is).

    Raises:
        ValueError: If the shapes don't fit or ``num_iterations`` < 1.
    """
    check_shapes(streams, phi, alpha, bias)
    check_iterations(num_iterations)
    leading, n = streams.shape[:-2], streams.shape[-2]
    dtype = compute_dtype(streams, phi, alpha, bias)
    with torch.autocast(streams.device.type, enabled=False):
        pre, post, residual = _StreamMappings.apply(
            streams.reshape(-1, *streams.shape[-2:]),
            phi.to(dtype),
            alpha.to(dtype),
            bias.to(dtype),
            num_iterations,
            eps,
        )
    return StreamMappings(
        pre.reshape(*leading, n), post.reshape(*leading, n), residual.reshape(*leading, n, n)
    )
