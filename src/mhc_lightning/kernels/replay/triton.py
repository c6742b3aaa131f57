"""A stretch of sub-layers' stream operations in one pass: streams stay in registers throughout.

Per token the entry is read once, and so is every output; streams and inputs are written as far as
they are asked for. With separate kernels each sub-layer's streams would be read twice more.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.mappings import StreamMappings
from mhc_lightning.kernels.triton_support.block_sizes import Config, configured
from mhc_lightning.kernels.triton_support.launch import launch
from mhc_lightning.kernels.triton_support.tiles import (
    inside,
    load_streams,
    load_weights,
    merged_stream,
    pointers,
    row_block,
    row_chunk,
    strides_in,
    vector_width,
    weighted_sum,
)

# Sub-layers are unrolled: longer stretches take several launches.
MOST_MERGES = 10


def replay_forward(
    entry: Tensor,
    outputs: Sequence[Tensor],
    mappings: Sequence[StreamMappings],
    want_streams: Sequence[bool],
    want_reads: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Streams and inputs of consecutive sub-layers, from what entered the first.

    Args:
        entry: [tokens, n, C], any strides.
        outputs: [tokens, C] of every sub-layer but the last.
        mappings: [tokens, n], [tokens, n] and [tokens, n, n] of every sub-layer, float32.
        want_streams: By sub-layer; False for the first.
        want_reads: By sub-layer.

    Returns:
        Streams [tokens, n, C] and inputs [tokens, C] by sub-layer, contiguous, in the dtype of
        `entry`; None where not wanted.
    """
    tokens, _, width = entry.shape
    streams = [entry.new_empty(entry.shape) if wanted else None for wanted in want_streams]
    reads = [entry.new_empty((tokens, width)) if wanted else None for wanted in want_reads]
    wanted = [k for k in range(len(mappings)) if want_streams[k] or want_reads[k]]
    last, current = max(wanted, default=-1), entry
    for first in range(0, max(last, 1) if wanted else 0, MOST_MERGES):
        until = min(first + MOST_MERGES, last)
        to_write, to_read = streams[first + 1 : until + 1], reads[first : until + 1]
        if first > 0:
            to_read[0] = None  # the launch before has read it
        if until < last and to_write[-1] is None:
            to_write[-1] = entry.new_empty(entry.shape)  # for the next launch
        _replay(current, outputs[first:until], mappings[first : until + 1], to_write, to_read)
        if until < last:
            assert to_write[-1] is not None
            current = to_write[-1]
    return streams, reads


def replay_forward_config(n: int, width: int, itemsize: int) -> Config:
    """As merging does: four warps that share as few rows as the width allows."""
    return Config(*row_block(width, itemsize, warps=4), num_warps=4, num_stages=1)


def _replay(
    entry: Tensor,
    outputs: Sequence[Tensor],
    mappings: Sequence[StreamMappings],
    streams: Sequence[Tensor | None],
    reads: Sequence[Tensor | None],
) -> None:
    """Fill `streams` of every sub-layer but the first, and `reads` of all, where not None."""
    tokens, n, width = entry.shape
    outputs = [output.contiguous() for output in outputs]
    default = replay_forward_config(n, width, entry.element_size())
    config = configured("replay_forward", n, width, entry.dtype, default)
    vector = vector_width(width, entry, *outputs)
    wanted = zip(reads, mappings, strict=True)
    launch(
        replay_forward_kernel,
        (triton.cdiv(tokens, config.block_tokens) * triton.cdiv(width, config.block_width),),
        entry,
        tuple(outputs),
        tuple(record.residual.contiguous() for record in mappings[:-1]),
        tuple(record.post.contiguous() for record in mappings[:-1]),
        tuple(None if read is None else record.pre.contiguous() for read, record in wanted),
        tuple(streams),
        tuple(reads),
        tokens,
        *strides_in(vector, entry),
        n=n,
        merges=len(outputs),
        width=width,
        vector=vector,
        block_tokens=config.block_tokens,
        block_width=config.block_width,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@triton.jit
def _store_read(ptr, pre_ptr, tiles, row, column, token, in_tokens, mask, n: tl.constexpr, width: tl.constexpr):  # fmt: skip  # noqa: E501
    total = weighted_sum(load_weights(pre_ptr, token, in_tokens, n), tiles, n)
    tl.store(ptr + row * width + column, total.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "token_stride", "stream_stride"])
def replay_forward_kernel(
    entry_ptr,
    outputs,  # tuples of pointers, one per merge
    residuals,
    posts,
    pres,  # one per sub-layer, None where its input is not wanted
    streams,  # one per merge, None where not wanted
    reads,
    tokens,
    token_stride,  # in units of `vector`
    stream_stride,
    width_stride,
    n: tl.constexpr,
    merges: tl.constexpr,
    width: tl.constexpr,
    vector: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
):
    token, column = row_chunk(tokens, width, block_tokens, block_width)
    in_tokens = token < tokens
    row = token[:, None]
    mask = inside(row, column, tokens, width, block_width)
    at = pointers(entry_ptr, row, column, token_stride, width_stride, vector)
    tiles = load_streams(at, stream_stride, mask, n, vector)
    if reads[0] is not None:
        _store_read(reads[0], pres[0], tiles, row, column, token, in_tokens, mask, n, width)
    for k in tl.static_range(merges):
        output = tl.load(outputs[k] + row * width + column, mask=mask, other=0.0)
        post = load_weights(posts[k], token, in_tokens, n)
        residual = load_weights(residuals[k], token, in_tokens, n * n)
        merged = ()
        for i in tl.static_range(n):
            total = merged_stream(i, tiles, output, residual, post, n)
            # Rounded as merging rounds what it writes.
            merged = merged + (total.to(entry_ptr.dtype.element_ty),)
        tiles = merged
        if streams[k] is not None:
            for i in tl.static_range(n):
                at = streams[k] + row * (n * width) + i * width + column
                tl.store(at, tiles[i], mask=mask)
        if reads[k + 1] is not None:
            _store_read(
                reads[k + 1], pres[k + 1], tiles, row, column, token, in_tokens, mask, n, width
            )
