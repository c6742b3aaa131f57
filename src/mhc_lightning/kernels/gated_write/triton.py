"""Gated writes in one pass over the streams, and the gradients in one pass over theirs.

The convolution's input is a multiple of the value for each stream: programs make it, what it gives
and what comes back through it of the value and of numbers per position, and write none of it.
"""

import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.gated_write.operands import (
    WriteGrads,
    WriteOperands,
    inverse_rms,
    mean_square,
    through_norm,
)
from mhc_lightning.kernels.triton_support.block_sizes import Config, configured
from mhc_lightning.kernels.triton_support.launch import launch
from mhc_lightning.kernels.triton_support.tiles import (
    WARP_BYTES,
    inside,
    pointers,
    row_block,
    row_chunk,
    strides_in,
    vector_width,
)

# Positions of a program in backward: a partial sum of the taps' gradient is small beside them.
_RANGE = 256


def write_forward(streams: Tensor, operands: WriteOperands) -> Tensor:
    """The new streams; the streams are read once, the value once for each tap.

    Args:
        streams: [B, S, n, C], any strides.
        operands: Gates and taps float32.
    """
    length, n, width = streams.shape[1:]
    value, gate = operands.value.contiguous(), operands.gate.contiguous()
    taps, dilation, scale = operands.taps, operands.dilation, None
    if taps is not None:
        scale = gate * inverse_rms(gate, mean_square(value, gate.dtype))
    flat = streams.flatten(0, 1)
    name = f"gated_write_forward{'' if taps is None else '_convolved'}"
    default = write_forward_config(n, width, streams.element_size())
    config = configured(name, n, width, streams.dtype, default)
    vector = vector_width(width, flat)
    new = streams.new_empty(streams.shape)
    tokens = flat.shape[0]
    launch(
        gated_write_forward_kernel,
        (triton.cdiv(tokens, config.block_tokens) * triton.cdiv(width, config.block_width),),
        flat,
        value,
        gate,
        scale,
        taps,
        new,
        tokens,
        length,
        value.shape[1] - length,
        *strides_in(vector, flat),
        n=n,
        width=width,
        count=0 if taps is None else len(taps),
        dilation=dilation,
        vector=vector,
        block_tokens=config.block_tokens,
        block_width=config.block_width,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return new


def write_backward(grad: Tensor, operands: WriteOperands) -> WriteGrads:
    """All gradients, given that of the new streams [B, S, n, C], any strides.

    With taps the gradient and the value are loaded once for each position that the convolution
    connects with a position; caches serve all loads but the first.
    """
    length, n, width = grad.shape[1:]
    value, gate = operands.value.contiguous(), operands.gate.contiguous()
    taps, dilation, inverse = operands.taps, operands.dilation, None
    if taps is not None:
        inverse = inverse_rms(gate, mean_square(value, gate.dtype))
    batch, positions = value.shape[:2]
    flat = grad.flatten(0, 1)
    name = f"gated_write_backward{'' if taps is None else '_convolved'}"
    default = write_backward_config(n, width, grad.element_size(), taps is not None)
    config = configured(name, n, width, grad.dtype, default)
    vector = vector_width(width, flat)
    rows, per_range = batch * positions, max(_RANGE, config.block_tokens)
    ranges, chunks = triton.cdiv(rows, per_range), triton.cdiv(width, config.block_width)
    value_grad = value.new_empty(value.shape)
    # Of gates, and behind them of what scales the convolution's input.
    sums = gate.new_empty(chunks, rows, n if taps is None else 2 * n)
    taps_sums = None if taps is None else taps.new_empty(ranges, *taps.shape)
    launch(
        gated_write_backward_kernel,
        (chunks, ranges),
        flat,
        value,
        gate,
        None if inverse is None else gate * inverse,
        taps,
        value_grad,
        sums,
        taps_sums,
        rows,
        positions,
        length,
        *strides_in(vector, flat),
        n=n,
        width=width,
        count=0 if taps is None else len(taps),
        dilation=dilation,
        vector=vector,
        per_range=per_range,
        block_tokens=config.block_tokens,
        block_width=config.block_width,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    gate_grad, *scale_grad = sums.sum(0).view(batch, positions, -1, n).unbind(2)
    if taps_sums is None or inverse is None:
        return WriteGrads(value_grad, gate_grad, None)
    more, square_grad = through_norm(scale_grad[0], gate, inverse)
    value_grad.addcmul_(value, square_grad * (2 / width))
    return WriteGrads(value_grad, gate_grad + more, taps_sums.sum(0))


def write_forward_config(n: int, width: int, itemsize: int) -> Config:
    """Four warps that share as few rows as the width allows, 16 bytes of each per thread."""
    return Config(*row_block(width, itemsize, warps=4), num_warps=4, num_stages=1)


def write_backward_config(n: int, width: int, itemsize: int, convolved: bool = True) -> Config:
    """A warp per position; few channels with taps, whose sums of all streams stay in registers."""
    if not convolved:
        return Config(4, WARP_BYTES // itemsize, num_warps=4, num_stages=1)
    return Config(4, 128 if n <= 2 else 64 if n <= 4 else 32, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["tokens", "length", "before", "token_stride", "stream_stride"])
def gated_write_forward_kernel(
    streams_ptr,
    value_ptr,
    gate_ptr,
    scale_ptr,  # None without taps
    taps_ptr,  # None without taps
    new_ptr,
    tokens,
    length,
    before,  # positions of the value before those of the streams
    token_stride,  # in units of `vector`, as all strides but the last
    stream_stride,
    width_stride,
    n: tl.constexpr,
    width: tl.constexpr,
    count: tl.constexpr,
    dilation: tl.constexpr,
    vector: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
):
    token, column = row_chunk(tokens, width, block_tokens, block_width)
    in_tokens = token < tokens
    row = token[:, None]
    mask = inside(row, column, tokens, width, block_width)
    in_width = column < width
    position = before + token % length
    place = token // length * (before + length) + position
    value = tl.load(value_ptr + place[:, None] * width + column, mask=mask, other=0.0)
    value = value.to(tl.float32)
    earlier = ()
    for k in tl.static_range(count - 1):
        back = (count - 1 - k) * dilation
        there = mask & (position >= back)[:, None]
        at = value_ptr + (place - back)[:, None] * width + column
        earlier = earlier + (tl.load(at, mask=there, other=0.0).to(tl.float32),)
    at = pointers(streams_ptr, row, column, token_stride, width_stride, vector)
    for i in tl.static_range(n):
        gate = tl.load(gate_ptr + place * n + i, mask=in_tokens, other=0.0)[:, None]
        offset = i * stream_stride.to(tl.int64) * vector
        total = tl.load(at + offset, mask=mask, other=0.0).to(tl.float32) + gate * value
        if count > 0:
            mixed = tl.zeros((block_tokens, block_width), tl.float32)
            for k in tl.static_range(count):
                back = (count - 1 - k) * dilation
                there = in_tokens & (position >= back)
                scale = tl.load(scale_ptr + (place - back) * n + i, mask=there, other=0.0)
                tap = tl.load(taps_ptr + (k * n + i) * width + column, mask=in_width, other=0.0)
                if k < count - 1:
                    mixed += tap * scale[:, None] * earlier[k]
                else:
                    mixed += tap * scale[:, None] * value
            total += mixed * tl.sigmoid(mixed)
        to = new_ptr + row * (n * width) + i * width + column
        tl.store(to, total.to(new_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "positions", "length", "token_stride", "stream_stride"])
def gated_write_backward_kernel(
    grad_ptr,
    value_ptr,
    gate_ptr,
    scale_ptr,  # None without taps
    taps_ptr,  # None without taps
    value_grad_ptr,
    sums_ptr,
    taps_sums_ptr,  # None without taps
    rows,
    positions,
    length,
    token_stride,  # in units of `vector`, as all strides but the last
    stream_stride,
    width_stride,
    n: tl.constexpr,
    width: tl.constexpr,
    count: tl.constexpr,
    dilation: tl.constexpr,
    vector: tl.constexpr,
    per_range: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
):
    near: tl.constexpr = count if count > 0 else 1  # outputs that a position reaches
    entries: tl.constexpr = 2 * n if count > 0 else n
    column = (tl.program_id(0) * block_width + tl.arange(0, block_width))[None, :]
    in_width = column < width
    to_sums = sums_ptr + tl.program_id(0).to(tl.int64) * rows * entries
    taps_sums = ()
    for _ in tl.static_range(n * count):
        taps_sums = taps_sums + (tl.zeros((block_tokens, block_width), tl.float32),)
    first = tl.program_id(1).to(tl.int64) * per_range
    for start in range(first, tl.minimum(first + per_range, rows), block_tokens):
        place = start + tl.arange(0, block_tokens)
        exists = place < rows
        mask = inside(place[:, None], column, rows, width, block_width)
        position = place % positions
        output = position - (positions - length)  # below 0: before the streams
        token = place // positions * length + output
        values = ()  # the values at all positions that meet this one in an output
        for m in tl.static_range(2 * near - 1):
            ahead = (m - (near - 1)) * dilation
            there = mask & ((position + ahead >= 0) & (position + ahead < positions))[:, None]
            at = value_ptr + (place + ahead)[:, None] * width + column
            values = values + (tl.load(at, mask=there, other=0.0).to(tl.float32),)
        value = values[near - 1]
        value_grad = tl.zeros((block_tokens, block_width), tl.float32)
        more_taps = ()
        for i in tl.static_range(n):
            gate = tl.load(gate_ptr + place * n + i, mask=exists, other=0.0)[:, None]
            inputs = ()
            if count > 0:
                for m in tl.static_range(2 * near - 1):
                    ahead = (m - (near - 1)) * dilation
                    there = (position + ahead >= 0) & (position + ahead < positions)
                    at = scale_ptr + (place + ahead) * n + i
                    scale = tl.load(at, mask=exists & there, other=0.0)[:, None]
                    inputs = inputs + (scale * values[m],)
            scaled_grad = tl.zeros((block_tokens, block_width), tl.float32)
            for j in tl.static_range(near):
                ahead = j * dilation
                sent = (output + ahead >= 0) & (output + ahead < length)
                at = pointers(
                    grad_ptr, (token + ahead)[:, None], column, token_stride, width_stride, vector
                )
                at += i * stream_stride.to(tl.int64) * vector
                grad = tl.load(at, mask=mask & sent[:, None], other=0.0).to(tl.float32)
                if j == 0:
                    value_grad += gate * grad
                    total = tl.sum(grad * value, axis=1)
                    tl.store(to_sums + place * entries + i, total, mask=exists)
                if count > 0:
                    mixed = tl.zeros((block_tokens, block_width), tl.float32)
                    for k in tl.static_range(count):
                        at = taps_ptr + (k * n + i) * width + column
                        tap = tl.load(at, mask=in_width, other=0.0)
                        mixed += tap * inputs[j + k]
                    squashed = tl.sigmoid(mixed)
                    mixed_grad = grad * squashed * (1 + mixed * (1 - squashed))
                    at = taps_ptr + ((count - 1 - j) * n + i) * width + column
                    scaled_grad += tl.load(at, mask=in_width, other=0.0) * mixed_grad
                    if j == 0:
                        for k in tl.static_range(count):
                            sums = taps_sums[i * count + k] + mixed_grad * inputs[k]
                            more_taps = more_taps + (sums,)
            if count > 0:
                scale = tl.load(scale_ptr + place * n + i, mask=exists, other=0.0)[:, None]
                value_grad += scale * scaled_grad
                total = tl.sum(scaled_grad * value, axis=1)
                tl.store(to_sums + place * entries + n + i, total, mask=exists)
        if count > 0:
            taps_sums = more_taps
        to = value_grad_ptr + place[:, None] * width + column
        tl.store(to, value_grad.to(value_grad_ptr.dtype.element_ty), mask=mask)
    if count > 0:
        for i in tl.static_range(n):
            for k in tl.static_range(count):
                at = (tl.program_id(1) * count + k) * n + i
                to = taps_sums_ptr + at.to(tl.int64) * width + column
                sums = tl.sum(taps_sums[i * count + k], axis=0)[None, :]
                tl.store(to, sums, mask=in_width)
