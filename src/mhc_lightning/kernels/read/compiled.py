"""Reading by compiled kernels: the streams come into a core's cache once in each direction."""

import ctypes

from torch import Tensor

from mhc_lightning.kernels.compiled_support.library import View, call, readable, result, view
from mhc_lightning.kernels.mappings import MappingGrads, MappingRule
from mhc_lightning.kernels.read.operands import (
    Projection,
    ReadGrads,
    ReadNeeds,
    ReadOperands,
    ReadResults,
)

_RULES = ("sinkhorn", "gates", "tanh", "linear")


class Reading(ctypes.Structure):
    """The operands of reading: the struct of `operands.h`."""

    _fields_ = (
        ("streams", ctypes.POINTER(View)),
        *((name, ctypes.c_void_p) for name in ("phi", "alpha", "bias", "carry")),
        *((name, ctypes.c_int64) for name in ("tokens", "n", "width", "coefficients")),
        *((name, ctypes.c_int64) for name in ("rule", "iterations")),
        ("eps", ctypes.c_double),
    )
    kept: tuple


def reading(operands: ReadOperands, rule: MappingRule) -> Reading:
    """The operands as kernels take them."""
    streams = view(operands.streams)
    dense = [None if t is None else t.contiguous() for t in operands[1:]]
    made = Reading(
        ctypes.pointer(streams),
        *(None if t is None else t.data_ptr() for t in dense),
        *operands.streams.shape,
        operands.phi.shape[1],
        _RULES.index(rule.name),
        rule.num_iterations,
        rule.eps,
    )
    made.kept = (streams, *dense)  # keeps their memory
    return made


def new_results(operands: ReadOperands, rule: MappingRule, want_read: bool) -> ReadResults:
    """Tensors for the results, not yet filled."""
    streams, phi = operands.streams, operands.phi
    tokens, n, width = streams.shape
    count = phi.shape[1]
    rows = tokens * n if rule.per_stream else tokens
    residual = (count - 2 * n,) if rule.name == "gates" else (n, n)
    return ReadResults(
        streams.new_empty((tokens, width) if want_read else 0),
        phi.new_empty(tokens, n),
        phi.new_empty(tokens, n),
        phi.new_empty(tokens, *residual),
        phi.new_empty(count, rows),
        phi.new_empty(rows),
    )


def new_grads(operands: ReadOperands, needs: ReadNeeds, read_grad: Tensor | None) -> ReadGrads:
    """Tensors for the gradients, not yet filled; None where not needed."""
    streams, phi, alpha, bias, carry = operands
    return ReadGrads(
        streams.new_empty(streams.shape) if needs.streams else None,
        phi.new_empty(phi.shape) if needs.phi else None,
        alpha.new_empty(alpha.shape),
        bias.new_empty(bias.shape),
        carry.new_empty(carry.shape)
        if carry is not None and needs.carry and read_grad is not None
        else None,
    )


def dense_grads(grads: MappingGrads) -> list[Tensor | None]:
    """Gradients of the mappings in dense memory."""
    return [None if grad is None else grad.contiguous() for grad in grads]


def read_forward(operands: ReadOperands, rule: MappingRule, want_read: bool) -> ReadResults:
    """Compute what `reference.read_forward` does."""
    streams, phi, *_ = operands
    results = new_results(operands, rule, want_read)
    read = result(results.read) if want_read else None
    call("read_forward", phi.dtype, reading(operands, rule), read, *results[1:], streams=streams)
    return results


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
    streams, phi, *_ = operands
    results = new_grads(operands, needs, read_grad)
    call(
        "read_backward",
        phi.dtype,
        reading(operands, rule),
        *(tensor.contiguous() for tensor in projection),
        None if kept_grad is None else view(readable(kept_grad)),
        None if read_grad is None else view(readable(read_grad)),
        *dense_grads(grads),
        result(results.streams),
        *results[1:],
        streams=streams,
    )
    return results
