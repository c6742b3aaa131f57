"""Masks and alignments that the kernels over [tokens, n, C] streams share."""

import math

import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16  # the widest load and store of a thread
WARP_BYTES = 32 * VECTOR_BYTES


def vector_width(width: int, *tensors: Tensor) -> int:
    """Elements that every row and chunk of the operands can be read by, whole and aligned.

    Args:
        width: C.
        *tensors: Stream-sized operands [tokens, ..., C]; the first one's dtype says how many
            elements make 16 bytes.

    Returns:
        The largest power of two up to 16 bytes that divides C and all strides but the last.
    """
    vector = VECTOR_BYTES // tensors[0].element_size()
    sizes = [width, *(stride for tensor in tensors for stride in _strides(tensor)[:-1])]
    while any(size % vector for size in sizes):
        vector //= 2
    return vector


def strides_in(vector: int, tensor: Tensor) -> tuple[int, ...]:
    """A tensor's strides as the kernels take them: all but the last in units of ``vector``.

    A kernel multiplies by ``vector``, a constant, and so the compiler knows that rows are aligned.
    """
    *rows, last = _strides(tensor)
    return (*(stride // vector for stride in rows), last)


def row_block(width: int, itemsize: int, warps: int) -> tuple[int, int]:
    """Tokens and elements of a block of a vector per thread, over as few rows as fit the width."""
    # Of an odd width a thread takes one element: were it more, warps would lie along the row, and
    # every thread would hold the weights of all the block's tokens.
    elements = 32 * math.gcd(width, VECTOR_BYTES // itemsize)
    tokens = warps
    while tokens > 1 and width % (2 * elements) == 0:
        tokens //= 2
        elements *= 2
    return tokens, elements


def _strides(tensor: Tensor) -> list[int]:
    """Strides; along an axis of one element, where torch may say anything, the harmless 0."""
    return [
        stride if size > 1 else 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]


@triton.jit
def inside(row, column, tokens, width: tl.constexpr, step: tl.constexpr):
    """Which elements exist; columns are compared only where ``step`` does not divide the width."""
    mask = row < tokens
    if width % step != 0:
        mask = mask & (column < width)
    return mask


@triton.jit
def pointers(ptr, row, column, token_stride, width_stride, vector: tl.constexpr):
    """To a tile's elements; the stride of tokens in units of ``vector``."""
    return ptr + row * token_stride * vector + column.to(tl.int64) * width_stride


@triton.jit
def load_streams(first, stride, mask, n: tl.constexpr, vector: tl.constexpr):
    """The n tiles of the streams, of which the pointers ``first`` point to stream 0's."""
    tiles = ()
    for j in tl.static_range(n):
        at = first + j * stride.to(tl.int64) * vector
        tiles = tiles + (tl.load(at, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_sums(ptr, sums, token, tokens, count: tl.constexpr):
    """Add up each of ``count`` tiles [tokens, lanes] over its lanes and store [tokens, count]."""
    columns: tl.constexpr = triton.next_power_of_2(count)
    column = tl.arange(0, columns)[None, :]
    row = token[:, None]
    totals = tl.zeros((token.shape[0], columns), tl.float32)
    for k in tl.static_range(count):
        totals = tl.where(column == k, tl.sum(sums[k], axis=1)[:, None], totals)
    tl.store(ptr + row * count + column, totals, mask=(row < tokens) & (column < count))
