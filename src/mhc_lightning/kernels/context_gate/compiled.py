"""Context gates by compiled kernels: each stream-sized operand is read or written once."""

import torch
from torch import Tensor

from mhc_lightning.kernels.compiled_support.library import call, readable, result, view
from mhc_lightning.kernels.context_gate.operands import GateGrads, GateOperands, GateResults


def gate_forward(operands: GateOperands, eps: float) -> GateResults:
    """Gates and what backward needs of the sums over C."""
    streams, key, weight = operands
    results = GateResults(*(weight.new_empty(streams.shape[:2]) for _ in GateResults._fields))
    given = view(streams), view(readable(key)), weight.contiguous()
    call(
        "context_gate_forward",
        weight.dtype,
        *given,
        *results,
        float(eps),
        *streams.shape,
        streams=streams,
    )
    return results


def gate_backward(
    operands: GateOperands,
    score: Tensor,
    inverse_rms: Tensor,
    key_inverse_rms: Tensor,
    kept_grad: Tensor | None,
    gate_grad: Tensor,
) -> GateGrads:
    """Gradients of streams, key and weight."""
    streams, key, weight = operands
    streams_grad = streams.new_empty(streams.shape)
    key_grad = readable(key).new_empty(key.shape)
    weight_grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    call(
        "context_gate_backward",
        weight.dtype,
        view(streams),
        view(readable(key)),
        *(t.contiguous() for t in (weight, score, inverse_rms, key_inverse_rms)),
        None if kept_grad is None else view(readable(kept_grad)),
        gate_grad.contiguous(),
        result(streams_grad),
        result(key_grad),
        weight_grad,
        *streams.shape,
        streams=streams,
    )
    return GateGrads(streams_grad, key_grad.to(key.dtype), weight_grad)
