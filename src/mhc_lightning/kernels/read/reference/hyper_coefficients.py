"""Coefficients of the original Hyper-Connections (arXiv 2409.19606; eq. 5 of 2512.24880).

With `z[j] = act(streams[j] / rms(streams[j]) · phi)` for each stream by itself,

    pre[j] = alpha[0] · z[j, 0] + b        post[j] = alpha[1] · z[j, 1] + b
    residual[i, j] = alpha[0] · z[j, 2 + i] + b

Raw coefficients are stored [n + 2, tokens·n], mappings per token.
"""

import torch
from torch import Tensor

from mhc_lightning.kernels.mappings import MappingGrads, StreamMappings


def hyper_coefficients_forward(
    raw: Tensor, inverse_rms: Tensor, alpha: Tensor, bias: Tensor, n: int, tanh: bool
) -> StreamMappings:
    """Mappings for raw coefficients [n + 2, tokens·n] and inverse norms [tokens·n]."""
    z = _activated(raw, inverse_rms, tanh).view(n + 2, -1, n)
    pre_bias, post_bias, residual_bias = bias.split([n, n, n * n])
    return StreamMappings(
        alpha[0] * z[0] + pre_bias,
        alpha[1] * z[1] + post_bias,
        (alpha[0] * z[2:].transpose(0, 1) + residual_bias.view(n, n)).contiguous(),
    )


def hyper_coefficients_backward(
    grads: MappingGrads,
    raw: Tensor,
    inverse_rms: Tensor,
    alpha: Tensor,
    n: int,
    width: int,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `raw`, of the norm (as the factor of x it adds), of alpha and of bias.

    `width` is C, the number of squares in the mean of a norm.
    """
    z = _activated(raw, inverse_rms, tanh)
    by_stream = z.new_zeros(n + 2, z.shape[1] // n, n)
    if grads.pre is not None:
        by_stream[0] = grads.pre
    if grads.post is not None:
        by_stream[1] = grads.post
    if grads.residual is not None:
        by_stream[2:] = grads.residual.transpose(0, 1)
    bias_grad = torch.cat([by_stream[k].sum(0) for k in (0, 1)] + [by_stream[2:].sum(1).flatten()])
    grad = by_stream.view(z.shape)
    terms = (grad * z).sum(1)
    alpha_grad = torch.stack([terms[0] + terms[2:].sum(), terms[1]])
    grad = grad * alpha[[0, 1] + [0] * n][:, None]
    if tanh:
        grad = grad * (1 - z.square())
    inverse_rms_grad = (grad * raw).sum(0)
    return (
        grad * inverse_rms,
        inverse_rms.pow(3) * inverse_rms_grad / -width,
        alpha_grad,
        bias_grad,
    )


def _activated(raw: Tensor, inverse_rms: Tensor, tanh: bool) -> Tensor:
    normed = raw * inverse_rms
    return normed.tanh() if tanh else normed
