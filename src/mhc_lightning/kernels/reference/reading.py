"""Mappings and the sub-layer's input from one pair of passes over the streams, and back."""

import torch
from torch import Tensor

from mhc_lightning.kernels.record import MappingGrads, StreamMappings
from mhc_lightning.kernels.reference.coefficients import (
    coefficients_backward,
    coefficients_forward,
)
from mhc_lightning.kernels.reference.hyper_coefficients import (
    hyper_coefficients_backward,
    hyper_coefficients_forward,
)
from mhc_lightning.kernels.reference.streams import aggregate_forward, dot_per_stream
from mhc_lightning.kernels.rule import Rule


def read_forward(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    rule: Rule,
    want_read: bool,
) -> tuple[Tensor, StreamMappings, Tensor, Tensor]:
    """Project (eqs. 14–15), compute the mappings and, if wanted, aggregate.

    Args:
        streams: [T, n, C].
        phi: [n·C, K], or [C, n + 2] if each stream has coefficients of its own.
        alpha: Gates.
        bias: [K], or [n² + 2n].
        carry: Weights [T, n] to aggregate with; None stands for the mappings' ``pre``.
        rule: How raw coefficients become mappings.
        want_read: Whether to aggregate.

    Returns:
        The sub-layer's input [T, C] (empty if not wanted), the mappings, the raw coefficients
        (products with phi, not divided by the norm) and the inverse norms.
    """
    n = streams.shape[1]
    wide = streams.to(phi.dtype).contiguous()
    flat = wide.reshape(-1, phi.shape[0])
    mean_square = torch.linalg.vector_norm(flat, dim=1).square() / flat.shape[1]
    inverse_rms = torch.rsqrt(mean_square + rule.eps)
    raw = phi.t() @ flat.t()
    if rule.per_stream:
        mappings = hyper_coefficients_forward(raw, inverse_rms, alpha, bias, n, rule.tanh)
    else:
        mappings = coefficients_forward(raw, inverse_rms, alpha, bias, n, rule)
    read = streams.new_empty(0)
    if want_read:
        weights = mappings.pre if carry is None else carry
        read = aggregate_forward(wide, weights).to(streams.dtype)
    return read, mappings, raw, inverse_rms


def read_backward(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    pre: Tensor,
    raw: Tensor,
    inverse_rms: Tensor,
    kept_grad: Tensor | None,
    read_grad: Tensor | None,
    grads: MappingGrads,
    rule: Rule,
    need_streams: bool,
    need_phi: bool,
    need_carry: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of streams, phi, alpha, bias and carry, None where not needed.

    Args:
        streams: [T, n, C].
        phi: As in ``read_forward``.
        alpha: Gates.
        bias: As in ``read_forward``.
        carry: As in ``read_forward``.
        pre: The mapping ``pre`` that it returned [T, n].
        raw: As ``read_forward`` returned them.
        inverse_rms: As ``read_forward`` returned them.
        kept_grad: What comes back through the streams themselves [T, n, C], to be added.
        read_grad: Gradient of the sub-layer's input [T, C].
        grads: Of the mappings.
        rule: As in ``read_forward``.
        need_streams: Whether the streams' gradient is asked for.
        need_phi: Whether phi's is.
        need_carry: Whether the carry's is, if there is one.
    """
    n = streams.shape[1]
    wide = streams.to(phi.dtype).contiguous()
    flat = wide.reshape(-1, phi.shape[0])
    carry_grad = None
    if read_grad is not None:
        read_grad = read_grad.to(phi.dtype).contiguous()
        if carry is None:
            dots = dot_per_stream(wide, read_grad)
            grads = grads._replace(pre=dots if grads.pre is None else grads.pre + dots)
        elif need_carry:
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
    if need_streams:
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
    phi_grad = (raw_grad @ flat).t().contiguous() if need_phi else None
    return streams_grad, phi_grad, alpha_grad, bias_grad, carry_grad
