"""Registration of reading: the operator, its backward pass, and its place in autograd."""

from typing import Any

import torch
from torch import Tensor

from mhc_lightning.kernels.backend import implementation
from mhc_lightning.kernels.mappings import MappingGrads, MappingRule
from mhc_lightning.kernels.read import reference
from mhc_lightning.kernels.read.operands import (
    Projection,
    ReadGrads,
    ReadNeeds,
    ReadOperands,
    ReadResults,
)
from mhc_lightning.kernels.registration import operator
from mhc_lightning.kernels.transforms import plain_gradients, transforming

_OPERANDS = len(ReadOperands._fields)


@operator("read_streams")
def read_op(operands: ReadOperands, rule: MappingRule, want_read: bool) -> ReadResults:
    """Project the streams, compute the mappings and, if wanted, aggregate."""
    kernels = implementation("read", operands.streams, operands.phi)
    return kernels.read_forward(operands, rule, want_read)


@operator("read_streams_backward")
def read_backward_op(
    operands: ReadOperands,
    projection: Projection,
    kept_grad: Tensor | None,
    read_grad: Tensor | None,
    grads: MappingGrads,
    rule: MappingRule,
    needs: ReadNeeds,
) -> ReadGrads:
    """Gradients of the operands; a carry that has no gradient gets zero."""
    kernels = implementation("read", operands.streams, operands.phi)
    result = kernels.read_backward(operands, projection, kept_grad, read_grad, grads, rule, needs)
    if needs.carry and operands.carry is not None and result.carry is None:
        result = result._replace(carry=torch.zeros_like(operands.carry))
    return result


class _Read(torch.autograd.Function):
    """`read_op` on streams [..., n, C], with the streams themselves as a further output.

    The kept streams are a view of the given streams, which the result of an operator cannot be.
    They are not made from the flat streams: an exporter with symbolic sizes would infer constraints
    on these sizes from splitting the tokens again.
    """

    @staticmethod
    def forward(ctx, streams, phi, alpha, bias, carry, *constants):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        flat = streams.reshape(-1, *streams.shape[-2:])
        ctx.constants, ctx.shape = constants, streams.shape
        outputs = read_op(flat, phi, alpha, bias, carry, *constants)
        read, pre, post, residual, raw, inverse_rms = outputs
        ctx.save_for_backward(flat, phi, alpha, bias, carry, pre, raw, inverse_rms)
        return streams.view_as(streams), read, pre, post, residual

    @staticmethod
    def backward(ctx, kept_grad, *grads):  # type: ignore[no-untyped-def]
        if kept_grad is not None:
            kept_grad = kept_grad.reshape(-1, *ctx.shape[-2:])
        streams_grad, *others = _gradients(ctx, kept_grad, *grads)
        return None if streams_grad is None else streams_grad.reshape(ctx.shape), *others


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs, given those of the kept streams, the input and the mappings."""
    if transforming():
        return plain_gradients(read_plain, ctx, _OPERANDS, grads)
    needs, rule = ctx.needs_input_grad[:_OPERANDS], ctx.constants[:-1]
    results = read_backward_op(*ctx.saved_tensors, *grads, *rule, needs[0], needs[1], needs[4])
    constants = (None,) * len(ctx.constants)
    return *(g if need else None for g, need in zip(results, needs, strict=True)), *constants


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    operands, ctx.constants = inputs[:_OPERANDS], inputs[_OPERANDS:]
    _, pre, _, _, raw, inverse_rms = output
    ctx.save_for_backward(*operands, pre, raw, inverse_rms)


def _backward(ctx: Any, read_grad: Tensor | None, *grads: Tensor | None) -> tuple:
    streams = ctx.saved_tensors[0]
    if read_grad is not None and read_grad.numel() == 0 and streams.numel() > 0:
        read_grad = None  # of the empty tensor that stands for an input that is not wanted
    return _gradients(ctx, None, read_grad, *grads[:3])


# An exported program holds the operator without `_Read`, and can be trained as well.
read_op.register_autograd(_backward, setup_context=_setup_context)


def read_plain(
    streams: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    carry: Tensor | None,
    rule: str,
    num_iterations: int,
    eps: float,
    want_read: bool,
) -> tuple[Tensor, ...]:
    """`read_and_keep` in plain torch, for the transforms of `torch.func`."""
    flat = streams.reshape(-1, *streams.shape[-2:])
    operands = ReadOperands(flat, phi, alpha, bias, carry)
    results = reference.read_forward(operands, MappingRule(rule, num_iterations, eps), want_read)
    return streams, *results[:4]


read_and_keep = _Read.apply
