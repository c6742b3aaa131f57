"""Reading by kernels: project, coefficients, aggregate; and the way back.

Between the passes over the streams, the few coefficients of the rule `"gates"` take plain torch.
"""

import torch
from torch import Tensor

from mhc_lightning.kernels.aggregate.triton import aggregate_backward, aggregate_forward
from mhc_lightning.kernels.mappings import MappingGrads, MappingRule, StreamMappings
from mhc_lightning.kernels.read.operands import (
    Projection,
    ReadGrads,
    ReadNeeds,
    ReadOperands,
    ReadResults,
)
from mhc_lightning.kernels.read.reference import coefficients as plain_coefficients
from mhc_lightning.kernels.read.triton.coefficients import (
    coefficients_backward,
    coefficients_forward,
)
from mhc_lightning.kernels.read.triton.hyper_coefficients import (
    hyper_coefficients_backward,
    hyper_coefficients_forward,
)
from mhc_lightning.kernels.read.triton.project import project
from mhc_lightning.kernels.read.triton.project_backward import project_backward


def read_forward(operands: ReadOperands, rule: MappingRule, want_read: bool) -> ReadResults:
    """Compute what `reference.read_forward` does."""
    streams, phi, alpha, bias, carry = operands
    products, squares = project(streams, phi.contiguous(), rule.per_stream)
    shape = (streams.shape[1], streams.shape[2])
    mappings, raw, inverse_rms = mappings_of(products, squares, alpha, bias, shape, rule)
    read = streams.new_empty(0)
    if want_read:
        read = aggregate_forward(streams, mappings.pre if carry is None else carry)
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
    """Compute what `reference.read_backward` does."""
    streams, phi, _, _, carry = operands
    carry_grad = None
    if carry is None:
        weights = projection.pre
        raw_grad, scale, alpha_grad, bias_grad = coefficient_grads(
            operands, projection, read_grad, grads, rule
        )
    else:
        weights = carry.contiguous()
        raw_grad, scale, alpha_grad, bias_grad = coefficient_grads(
            operands, projection, None, grads, rule
        )
        if read_grad is not None and needs.carry:
            _, carry_grad = aggregate_backward(read_grad, streams, carry, False, True)
    streams_grad, phi_grad = project_backward(
        *(streams, phi.contiguous(), raw_grad, scale, weights, read_grad, kept_grad),
        need_streams=needs.streams,
        need_phi=needs.phi,
        per_stream=rule.per_stream,
    )
    return ReadGrads(streams_grad, phi_grad, alpha_grad, bias_grad, carry_grad)


def mappings_of(
    raw_partials: Tensor,
    square_partials: Tensor,
    alpha: Tensor,
    bias: Tensor,
    shape: tuple[int, int],
    rule: MappingRule,
) -> tuple[StreamMappings, Tensor, Tensor]:
    """Mappings, raw coefficients and inverse norms for streams of `shape` (n, C)."""
    n, width = shape
    partials = (raw_partials, square_partials, alpha, bias, n)
    if rule.name == "gates":
        raw = raw_partials.sum(0)
        inverse_rms = torch.rsqrt(square_partials.sum(0) / (n * width) + rule.eps)
        gated = plain_coefficients.coefficients_forward(raw, inverse_rms, alpha, bias, n, rule)
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
    operands: ReadOperands,
    projection: Projection,
    read_grad: Tensor | None,
    grads: MappingGrads,
    rule: MappingRule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of raw, of the norm, of alpha and of bias; `read_grad` came through `pre`."""
    streams, _, alpha, bias, _ = operands
    pre, raw, inverse_rms = projection
    n, width = streams.shape[1:]
    if read_grad is not None:
        _, dots = aggregate_backward(read_grad, streams, pre, need_streams=False, need_pre=True)
        assert dots is not None
        grads = grads.plus_pre(dots)
    if rule.per_stream:
        return hyper_coefficients_backward(grads, raw, inverse_rms, alpha, n, width, rule.tanh)
    given = (grads, raw, inverse_rms, alpha, bias, n, n * width)
    if rule.name == "gates":
        return plain_coefficients.coefficients_backward(*given, rule)
    return coefficients_backward(*given, rule.num_iterations)
