"""Gated writes by compiled kernels: each stream-sized operand is read or written once."""

from torch import Tensor

from mhc_lightning.kernels.compiled_support.library import View, call, readable, result, view
from mhc_lightning.kernels.gated_write.operands import WriteGrads, WriteOperands


def write_forward(streams: Tensor, operands: WriteOperands) -> Tensor:
    """Streams [B, S, n, C] with the gated value, and what the convolution makes of it, added."""
    new = streams.new_empty(streams.shape)
    call(
        "gated_write_forward",
        operands.gate.dtype,
        view(streams.flatten(0, 1)),
        *_given(operands),
        result(new.flatten(0, 1)),
        *_sizes(streams, operands),
        streams=streams,
    )
    return new


def write_backward(grad: Tensor, operands: WriteOperands) -> WriteGrads:
    """Gradients of value, gate and taps, given that of the new streams [B, S, n, C]."""
    value, gate, taps, _ = operands
    value_grad = readable(value).new_empty(value.shape)
    gate_grad = gate.new_empty(gate.shape)
    taps_grad = None if taps is None else taps.new_empty(taps.shape)
    call(
        "gated_write_backward",
        gate.dtype,
        view(grad.flatten(0, 1)),
        *_given(operands),
        result(value_grad.flatten(0, 1)),
        gate_grad,
        taps_grad,
        *_sizes(grad, operands),
        streams=grad,
    )
    return WriteGrads(value_grad.to(value.dtype), gate_grad, taps_grad)


def _given(operands: WriteOperands) -> tuple[View, Tensor, Tensor | None]:
    value, gate, taps, _ = operands
    flat = view(readable(value).flatten(0, 1))
    return flat, gate.contiguous(), None if taps is None else taps.contiguous()


def _sizes(streams: Tensor, operands: WriteOperands) -> tuple[int, ...]:
    """B, P, S, n, C, K, dilation."""
    batch, length, n, width = streams.shape
    taps = 0 if operands.taps is None else len(operands.taps)
    return batch, operands.value.shape[1], length, n, width, taps, operands.dilation
