"""Reading by kernels: project, coefficients, aggregate; and the way back.

Between the passes over the streams, the few coefficients of the rule ``"gates"`` take plain torch.
"""

import torch
from torch import Tensor

from mhc_lightning.kernels import reference
from mhc_lightning.kernels.record import MappingGrads, StreamMappings
from mhc_lightning.kernels.rule import Rule
from mhc_lightning.kernels.triton.aggregate import aggregate_backward, aggregate_forward
from mhc_lightning.kernels.triton.coefficients import coefficients_backward, coefficients_forward
from mhc_lightning.kernels.triton.hyper_coefficients import (
    hyper_coefficients_backward,
    hyper_coefficients_forward,
)
from mhc_lightning.kernels.triton.project import project
from mhc_lightning.kernels.triton.project_backward import project_backward


def mappings_of(
    raw_partials: Tensor,
    square_partials: Tensor,
    alpha: Tensor,
    bias: Tensor,
    shape: tuple[int, int],
    rule: Rule,
) -> tuple[StreamMappings, Tensor, Tensor]:
    """Mappings, raw coefficients and inverse norms for streams of ``shape`` (n, C)."""
    n, width = shape
    partials = (raw_partials, square_partials, alpha, bias, n)
    if rule.name == "gates":
        raw = raw_partials.sum(0)
        inverse_rms = torch.rsqrt(square_partials.sum(0) / (n * width) + rule.eps)
        gated = reference.coefficients_forward(raw, inverse_rms, alpha, bias, n, rule)
        return gated, raw, inverse_rms
    if rule.per_stream:
        *mappings, raw, inverse_rms = hyper_coefficients_forward(
            *partials, width, rule.tanh, rule.eps
        )
    else:
        *mappings, raw, inverse_rms = coefficients_forward(
            *partials, n * width, rule.num_iterations, rule.eps
        )
    return StreamMappings(*mappings), raw, inverse_rms


def coefficient_grads(
    streams: Tensor,
    alpha: Tensor,
    bias: Tensor,
    pre: Tensor,
    raw: Tensor,
    inverse_rms: Tensor,
    read_grad: Tensor | None,
    grads: MappingGrads,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of raw, of the norm, of alpha and of bias; ``read_grad`` came through ``pre``."""
    n, width = streams.shape[1:]
    if read_grad is not None:
        _, dots = aggregate_backward(read_grad, streams, pre, need_streams=False, need_pre=True)
        assert dots is not None
        grads = grads._replace(pre=dots if grads.pre is None else grads.pre + dots)
    if rule.name == "gates":
        return reference.coefficients_backward(
            grads, raw, inverse_rms, alpha, bias, n, n * width, rule
        )
    if rule.per_stream:
        return hyper_coefficients_backward(
            grads, raw, inverse_rms, alpha, bias, n, width, rule.tanh
        )
    return coefficients_backward(
        grads, raw, inverse_rms, alpha, bias, n, n * width, rule.num_iterations
    )


def read_forward(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    rule: Rule,
    want_read: bool,
) -> tuple[Tensor, StreamMappings, Tensor, Tensor]:
    """What ``reference.read_forward`` computes."""
    products, squares = project(streams, phi.contiguous(), rule.per_stream)
    shape = (streams.shape[1], streams.shape[2])
    mappings, raw, inverse_rms = mappings_of(products, squares, alpha, bias, shape, rule)
    read = streams.new_empty(0)
    if want_read:
        read = aggregate_forward(streams, mappings.pre if carry is None else carry)
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
    """What ``reference.read_backward`` computes."""
    raw_grad, scale, alpha_grad, bias_grad = coefficient_grads(
        *(streams, alpha, bias, pre, raw, inverse_rms),
        read_grad if carry is None else None,
        grads,
        rule,
    )
    carry_grad = None
    if carry is not None and read_grad is not None and need_carry:
        _, carry_grad = aggregate_backward(read_grad, streams, carry, False, True)
    weights = pre if carry is None else carry.contiguous()
    streams_grad, phi_grad = project_backward(
        *(streams, phi.contiguous(), raw_grad, scale, weights, read_grad, kept_grad),
        need_streams=need_streams,
        need_phi=need_phi,
        per_stream=rule.per_stream,
    )
    return streams_grad, phi_grad, alpha_grad, bias_grad, carry_grad
