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
from mhc_lightning.kernels.transforms import transforming


def write_forward(streams: Tensor, operands: WriteOperands) -> Tensor:
    """Streams [B, S, n, C] with the gated value, and what the convolution makes of it, added."""
    value, gate = operands.value.to(operands.gate.dtype), operands.gate
    length = streams.shape[1]
    add, plus = (torch.addcmul, torch.add) if transforming() else (Tensor.addcmul_, Tensor.add_)
    now = gate[:, -length:, :, None], value[:, -length:, None]
    if operands.taps is None:
        return torch.addcmul(streams.to(gate.dtype), *now).to(streams.dtype)
    inverse = inverse_rms(gate, mean_square(value, gate.dtype))
    mixed = _convolved(_scaled(value, gate * inverse, operands, length), operands, length)
    mixed = F.silu(mixed, inplace=not transforming())
    return plus(add(mixed, *now), streams).to(streams.dtype)


def write_backward(grad: Tensor, operands: WriteOperands) -> WriteGrads:
    """Gradients of value, gate and taps, given that of the new streams [B, S, n, C]."""
    value, gate, taps = operands.value.to(operands.gate.dtype), operands.gate, operands.taps
    length, before = grad.shape[1], value.shape[1] - grad.shape[1]
    grad = F.pad(grad.to(gate.dtype), (0, 0, 0, 0, before, 0)).contiguous()
    shape, flat = value.shape, grad.flatten(0, 1)
    tokens, gates = value.flatten(0, 1), gate.flatten(0, 1)
    value_grad = aggregate_forward(flat, gates)
    gate_grad = dot_per_stream(flat, tokens)
    taps_grad = None
    if taps is not None:
        square = mean_square(tokens, gate.dtype)
        inverse = inverse_rms(gates, square)
        scale = gates * inverse
        scaled = _scaled(value, scale.view_as(gate), operands, length)
        mixed = _convolved(scaled, operands, length)
        mixed_grad = torch.ops.aten.silu_backward(grad[:, before:], mixed)
        scaled_grad = torch.zeros_like(scaled)
        taps_grad = torch.empty_like(taps)
        for tap, weight in enumerate(taps):
            there = slice(tap * operands.dilation, tap * operands.dilation + length)
            scaled_grad[:, there].addcmul_(mixed_grad, weight)
            torch.mul(mixed_grad, scaled[:, there], out=mixed)
            torch.sum(mixed, (0, 1), out=taps_grad[tap])
        scaled_grad = scaled_grad[:, operands.reach - before :].flatten(0, 1)
        value_grad += aggregate_forward(scaled_grad, scale)
        more, square_grad = through_norm(dot_per_stream(scaled_grad, tokens), gates, inverse)
        gate_grad += more
        value_grad.addcmul_(tokens, square_grad * (2 / shape[-1]))
    return WriteGrads(
        value_grad.view(shape).to(operands.value.dtype), gate_grad.view_as(gate), taps_grad
    )


def _scaled(value: Tensor, scale: Tensor, operands: WriteOperands, length: int) -> Tensor:
    """Normalised gated values [B, reach + S, n, C]; zero before the first position."""
    missing = operands.reach + length - value.shape[1]
    value, scale = (F.pad(x, (0, 0, missing, 0)) for x in (value, scale))
    return scale[..., None] * value[..., None, :]


def _convolved(scaled: Tensor, operands: WriteOperands, length: int) -> Tensor:
    assert operands.taps is not None
    add = torch.addcmul if transforming() else Tensor.addcmul_
    mixed = scaled[:, :length] * operands.taps[0]
    for tap in range(1, len(operands.taps)):
        first = tap * operands.dilation
        mixed = add(mixed, scaled[:, first : first + length], operands.taps[tap])
    return mixed
