"""Reading in plain torch: mappings and the sub-layer's input, and back."""

import torch
from torch import Tensor

from mhc_lightning.kernels.aggregate.reference import aggregate_forward, dot_per_stream
from mhc_lightning.kernels.mappings import MappingGrads, MappingRule
from mhc_lightning.kernels.read.operands import (
    Projection,
    ReadGrads,
    ReadNeeds,
    ReadOperands,
    ReadResults,
)
from mhc_lightning.kernels.read.reference.coefficients import (
    coefficients_backward,
    coefficients_forward,
)
from mhc_lightning.kernels.read.reference.hyper_coefficients import (
    hyper_coefficients_backward,
    hyper_coefficients_forward,
)


def read_forward(operands: ReadOperands, rule: MappingRule, want_read: bool) -> ReadResults:
    """Project (eqs. 14–15 of arXiv 2512.24880), compute the mappings and, if wanted, aggregate."""
    streams, phi, alpha, bias, carry = operands
    n = streams.shape[1]
    wide = streams.to(phi.dtype).contiguous()  # [T, n, C]
    flat = wide.reshape(-1, phi.shape[0])  # [T, n·C], or [T·n, C] for HC
    mean_square = torch.linalg.vector_norm(flat, dim=1).square() / flat.shape[1]
    inverse_rms = torch.rsqrt(mean_square + rule.eps)
    raw = phi.t() @ flat.t()  # [K, T], or [n + 2, T·n]
    if rule.per_stream:
        mappings = hyper_coefficients_forward(raw, inverse_rms, alpha, bias, n, rule.tanh)
    else:
        mappings = coefficients_forward(raw, inverse_rms, alpha, bias, n, rule)
    read = streams.new_empty(0)
    if want_read:
        weights = mappings.pre if carry is None else carry
        read = aggregate_forward(wide, weights).to(streams.dtype)
    return ReadResults(read, *mappings, raw, inverse_rms)


def read_backward(
    operands: ReadOperands,
    projection: Projection,
    kept_grad: Tensor | None,
    read_grad: Tensor | None,
    grads: MappingGrads,
    rule: MappingRule,
    needs: ReadNeeds,
) -> ReadGrads:
    """Gradients of the operands, None where not needed.

    Args:
        operands: As in `read_forward`.
        projection: Results of `read_forward`.
        kept_grad: Gradient that comes back through the streams themselves [T, n, C], to be added.
        read_grad: Gradient of the sub-layer's input [T, C].
        grads: Gradients of the mappings.
        rule: As in `read_forward`.
        needs: The gradients that are asked for.
    """
    streams, phi, alpha, bias, carry = operands
    pre, raw, inverse_rms = projection
    n = streams.shape[1]
    wide = streams.to(phi.dtype).contiguous()  # [T, n, C]
    flat = wide.reshape(-1, phi.shape[0])  # [T, n·C], or [T·n, C] for HC
    carry_grad = None
    if read_grad is not None:
        read_grad = read_grad.to(phi.dtype).contiguous()
        if carry is None:
            grads = grads.plus_pre(dot_per_stream(wide, read_grad))
        elif needs.carry:
            carry_grad = dot_per_stream(wide, read_grad)
    width = flat.shape[1]
    if rule.per_stream:
        raw_grad, scale, alpha_grad, bias_grad = hyper_coefficients_backward(
            grads, raw, inverse_rms, alpha, n, width, rule.tanh
        )
    else:
        raw_grad, scale, alpha_grad, bias_grad = coefficients_backward(
            grads, raw, inverse_rms, alpha, bias, n, width, rule
        )
    streams_grad = None
    if needs.streams:
        if kept_grad is None:
            grad = raw_grad.t() @ phi.t()
        else:
            grad = torch.addmm(kept_grad.to(phi.dtype).reshape(flat.shape), raw_grad.t(), phi.t())
        grad.addcmul_(flat, scale[:, None])
        grad = grad.view(streams.shape)
        if read_grad is not None:
            weights = pre if carry is None else carry
            grad.addcmul_(weights[:, :, None], read_grad[:, None, :])
        streams_grad = grad.to(streams.dtype)
    phi_grad = (raw_grad @ flat).t().contiguous() if needs.phi else None
    return ReadGrads(streams_grad, phi_grad, alpha_grad, bias_grad, carry_grad)
