"""Gated writes in plain torch, forward and backward, in the gates' precision."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mhc_lightning.kernels.aggregate.reference import aggregate_forward, dot_per_stream
from mhc_lightning.kernels.gated_write.operands import (
    WriteGrads,
    WriteOperands,
    inverse_rms,
    mean_square,
    through_norm,
)
from mhc_lightning.kernels.pieces import sequence_pieces
from mhc_lightning.kernels.transforms import ordinary, transforming


def write_forward(streams: Tensor, operands: WriteOperands) -> Tensor:
    """Streams [B, S, n, C] with the gated value, and what the convolution makes of it, added."""
    gate, length = operands.gate, streams.shape[1]
    now = gate[:, -length:, :, None], operands.value[:, -length:, None].to(gate.dtype)
    if operands.taps is None:
        return torch.addcmul(streams.to(gate.dtype), *now).to(streams.dtype)
    add, plus = (torch.addcmul, torch.add) if transforming() else (Tensor.addcmul_, Tensor.add_)
    value, scale = _before(operands, length)
    new = torch.empty_like(streams, memory_format=torch.contiguous_format)
    for rows, here in sequence_pieces(streams):
        scaled = _scaled(value[rows], scale[rows], here, operands.reach)
        mixed = F.silu(_convolved(scaled, operands), inplace=not transforming())
        mixed = plus(add(mixed, *(x[rows, here] for x in now)), streams[rows, here])
        if not ordinary(streams):
            return mixed.to(streams.dtype)
        new[rows, here] = mixed
    return new


def write_backward(grad: Tensor, operands: WriteOperands) -> WriteGrads:
    """Gradients of value, gate and taps, given that of the new streams [B, S, n, C]."""
    dtype, length, reach = operands.gate.dtype, grad.shape[1], operands.reach
    missing = reach + length - operands.value.shape[1]
    value, gate = (F.pad(x.to(dtype), (0, 0, missing, 0)) for x in operands[:2])
    value_grad, gate_grad = torch.zeros_like(value), torch.zeros_like(gate)
    scale_grad, scale = torch.zeros_like(gate), gate * inverse_rms(gate, mean_square(value, dtype))
    taps_sums: list[Tensor] = []
    from_before = grad.new_zeros(0)
    for rows, here in sequence_pieces(grad):
        sent = grad[rows, here].to(dtype)
        now = slice(reach + here.start, reach + here.stop)
        _add(value_grad[rows, now], gate_grad[rows, now], sent, value[rows, now], gate[rows, now])
        if operands.taps is None:
            continue
        scaled = _scaled(value[rows], scale[rows], here, reach)
        mixed_grad = torch.ops.aten.silu_backward(sent, _convolved(scaled, operands))
        if not taps_sums:
            taps_sums = [torch.zeros_like(mixed_grad) for _ in operands.taps]
        scaled_grad = torch.zeros_like(scaled)
        if here.start > 0:
            scaled_grad[:, :reach] = from_before
        for tap, weight in enumerate(operands.taps):
            there = slice(tap * operands.dilation, tap * operands.dilation + sent.shape[1])
            scaled_grad[:, there].addcmul_(mixed_grad, weight)
            taps_sums[tap][: len(sent), : sent.shape[1]].addcmul_(mixed_grad, scaled[:, there])
        # What the next piece's positions send to these ones is still to come.
        whole = scaled.shape[1] if here.stop == length else sent.shape[1]
        scaled_grad, from_before = scaled_grad[:, :whole], scaled_grad[:, whole:]
        seen = rows, slice(here.start, here.start + whole)
        _add(value_grad[seen], scale_grad[seen], scaled_grad, value[seen], scale[seen])
    if operands.taps is not None:
        inverse = inverse_rms(gate, mean_square(value, dtype))
        more, square_grad = through_norm(scale_grad, gate, inverse)
        gate_grad += more
        value_grad.addcmul_(value, square_grad * (2 / value.shape[-1]))
    return WriteGrads(
        # Results of their own, not views behind what was missing.
        torch.empty_like(operands.value, memory_format=torch.contiguous_format).copy_(
            value_grad[:, missing:]
        ),
        torch.empty_like(operands.gate, memory_format=torch.contiguous_format).copy_(
            gate_grad[:, missing:]
        ),
        torch.stack([sums.sum((0, 1)) for sums in taps_sums]) if taps_sums else None,
    )


def _add(value_grad: Tensor, gate_grad: Tensor, grad: Tensor, value: Tensor, gate: Tensor) -> None:
    """Add the gradients of `gate · value`, all [b, s, …], given that of the product."""
    flat = grad.flatten(0, 1)
    value_grad += aggregate_forward(flat, gate.flatten(0, 1)).view_as(value)
    gate_grad += dot_per_stream(flat, value.flatten(0, 1)).view_as(gate)


def _before(operands: WriteOperands, length: int) -> tuple[Tensor, Tensor]:
    """Values and their scales with `reach` positions before the first one, zero if not given."""
    gate = operands.gate
    missing = operands.reach + length - gate.shape[1]
    scale = gate * inverse_rms(gate, mean_square(operands.value, gate.dtype))
    value, scale = (F.pad(x, (0, 0, missing, 0)) for x in (operands.value.to(gate.dtype), scale))
    return value, scale


def _scaled(value: Tensor, scale: Tensor, here: slice, reach: int) -> Tensor:
    """Normalised gated values of a piece [b, reach + s, n, C]."""
    seen = slice(here.start, here.stop + reach)
    return scale[:, seen, :, None] * value[:, seen, None]


def _convolved(scaled: Tensor, operands: WriteOperands) -> Tensor:
    assert operands.taps is not None
    add = torch.addcmul if transforming() else Tensor.addcmul_
    length = scaled.shape[1] - operands.reach
    mixed = scaled[:, :length] * operands.taps[0]
    for tap in range(1, len(operands.taps)):
        first = tap * operands.dilation
        mixed = add(mixed, scaled[:, first : first + length], operands.taps[tap])
    return mixed
