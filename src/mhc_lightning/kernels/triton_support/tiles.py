"""Loads, stores and alignments that the kernels over [T, n, C] streams share.

All Triton kernels of this package share these names and shapes:

- T tokens, of which a program has `block_tokens` (BT)
- n streams
- C channels, `width`, of which a program takes `block_width` (BC) at a time
- K coefficients of a token, `count`, padded to `padded_count` for products
- `token` and `channel`: the indices [BT] and [BC]
- `row` and `column`: the same indices in the shape of a tile, [BT, 1] and [1, BC]

Names of pointers end in `_ptr`, names of strides in `_stride`. Constants are lower-case, as the
host's are.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16  # the widest load and store of a thread
WARP_BYTES = 32 * VECTOR_BYTES


def vector_width(width: int, *tensors: Tensor) -> int:
    """Elements of the widest vector that divides every row and chunk of the operands, aligned.

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
    """A tensor's strides as the kernels take them: all but the last in units of `vector`.

    A kernel multiplies by the constant `vector`, from which the compiler knows that rows are
    aligned.
    """
    *rows, last = _strides(tensor)
    return (*(stride // vector for stride in rows), last)


def row_block(width: int, itemsize: int, warps: int) -> tuple[int, int]:
    """Tokens and elements of a block of a vector per thread, over as few rows as fit the width."""
    # With an odd width a thread takes one element. With more, warps would lie along the row, and
    # every thread would hold the weights of all the block's tokens.
    elements = 32 * math.gcd(width, VECTOR_BYTES // itemsize)
    tokens = warps
    while tokens > 1 and width % (2 * elements) == 0:
        tokens //= 2
        elements *= 2
    return tokens, elements


def _strides(tensor: Tensor) -> list[int]:
    """Strides, with 0 for an axis of one element, where torch may give any number."""
    return [
        stride if size > 1 else 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]


@triton.jit
def inside(row, column, tokens, width: tl.constexpr, step: tl.constexpr):
    """Mask of the elements that exist; columns are compared if `step` does not divide the width."""
    mask = row < tokens
    if width % step != 0:
        mask = mask & (column < width)
    return mask


@triton.jit
def row_chunk(tokens, width: tl.constexpr, block_tokens: tl.constexpr, block_width: tl.constexpr):
    """This program's tokens [BT] and channels [1, BC]: neighbours take neighbouring chunks of C."""
    chunks: tl.constexpr = (width + block_width - 1) // block_width
    program = tl.program_id(0)
    token = (program // chunks).to(tl.int64) * block_tokens + tl.arange(0, block_tokens)
    column = ((program % chunks) * block_width + tl.arange(0, block_width))[None, :]
    return token, column


@triton.jit
def pointers(ptr, row, column, token_stride, width_stride, vector: tl.constexpr):
    """Pointers to a tile's elements; the stride of tokens is in units of `vector`."""
    return ptr + row * token_stride * vector + column.to(tl.int64) * width_stride


@triton.jit
def load_streams(first, stride, mask, n: tl.constexpr, vector: tl.constexpr):
    """The n tiles of the streams; the pointers `first` point to the tile of stream 0."""
    tiles = ()
    for j in tl.static_range(n):
        at = first + j * stride.to(tl.int64) * vector
        tiles = tiles + (tl.load(at, mask=mask, other=0.0),)
    return tiles


@triton.jit
def load_tile(ptr, token, channel, token_stride, width_stride, mask):
    """The tile [BT, BC] of an operand [T, C], in its dtype."""
    offsets = token[:, None] * token_stride + (channel.to(tl.int64) * width_stride)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def load_stream_tile(ptr, token, stream, channel, token_stride, stream_stride, width_stride, mask):
    """The tile [BT, BC] of one stream of an operand [T, n, C], in its dtype."""
    first = ptr + token[:, None] * token_stride + tl.cast(stream, tl.int64) * stream_stride
    offsets = (channel.to(tl.int64) * width_stride)[None, :]
    return tl.load(first + offsets, mask=mask, other=0.0)


@triton.jit
def load_stream_tiles(ptr, token, channel, token_stride, stream_stride, width_stride, mask, n: tl.constexpr):  # fmt: skip  # noqa: E501
    """The tiles [BT, BC] of all n streams of an operand [T, n, C]."""
    tiles = ()
    for j in tl.static_range(n):
        tile = load_stream_tile(
            ptr, token, j, channel, token_stride, stream_stride, width_stride, mask
        )
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def load_weights(ptr, token, in_tokens, count: tl.constexpr):
    """The `count` weights of every token in [T, count], each as a column [BT, 1]."""
    weights = ()
    for k in tl.static_range(count):
        weight = tl.load(ptr + token * count + k, mask=in_tokens, other=0.0)
        weights = weights + (weight[:, None],)
    return weights


@triton.jit
def weighted_sum(weights, tiles, n: tl.constexpr):
    """`Σ_j weights[j] · tiles[j]` [BT, BC] in float32; weights are columns [BT, 1] or numbers."""
    total = tl.zeros(tiles[0].shape, tl.float32)
    for j in tl.static_range(n):
        total += weights[j] * tiles[j].to(tl.float32)
    return total


@triton.jit
def merged_stream(i: tl.constexpr, tiles, output, residual, post, n: tl.constexpr):
    """`Σ_j residual[i, j] · tiles[j] + post[i] · output` [BT, BC] in float32 (eq. 3).

    `tiles` are those of the n streams, `residual` are n² columns [BT, 1], and `post` n columns.
    """
    total = post[i] * output.to(tl.float32)
    for j in tl.static_range(n):
        total += residual[i * n + j] * tiles[j].to(tl.float32)
    return total


@triton.jit
def store_sums(ptr, sums, token, tokens, count: tl.constexpr):
    """Add up each of `count` tiles [tokens, lanes] over its lanes and store [tokens, count]."""
    columns: tl.constexpr = triton.next_power_of_2(count)
    column = tl.arange(0, columns)[None, :]
    row = token[:, None]
    totals = tl.zeros((token.shape[0], columns), tl.float32)
    for k in tl.static_range(count):
        totals = tl.where(column == k, tl.sum(sums[k], axis=1)[:, None], totals)
    tl.store(ptr + row * count + column, totals, mask=(row < tokens) & (column < count))
