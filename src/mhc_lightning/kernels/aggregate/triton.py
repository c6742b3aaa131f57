"""Weighted sums of the streams in one pass, and their gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.triton_support.block_sizes import Config, configured
from mhc_lightning.kernels.triton_support.launch import launch
from mhc_lightning.kernels.triton_support.tiles import (
    VECTOR_BYTES,
    WARP_BYTES,
    inside,
    load_streams,
    load_weights,
    pointers,
    row_block,
    row_chunk,
    store_sums,
    strides_in,
    vector_width,
    weighted_sum,
)


def aggregate_forward(streams: Tensor, pre: Tensor) -> Tensor:
    """`Σ_j pre[j] · streams[j]`.

    Args:
        streams: [tokens, n, C], any strides.
        pre: Read weights [tokens, n], float32.

    Returns:
        [tokens, C], contiguous, in the dtype of `streams`.
    """
    return sum_streams("aggregate_forward", streams, pre, 1.0)


def aggregate_backward(
    grad: Tensor, streams: Tensor, pre: Tensor, need_streams: bool, need_pre: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients of `aggregate_forward`; reads `grad` and `streams` once.

    Args:
        grad: Gradient of the sum [tokens, C], any strides.
        streams: [tokens, n, C], any strides; not read unless `need_pre`.
        pre: [tokens, n], float32.
        need_streams: True if the first result is wanted.
        need_pre: True if the second result is wanted.

    Returns:
        Gradients of the streams (contiguous, in their dtype) and of `pre` (float32), or None.
    """
    streams_grad = streams.new_empty(streams.shape) if need_streams else None
    pre_grad = torch.empty_like(pre, memory_format=torch.contiguous_format) if need_pre else None
    if need_streams or need_pre:
        tokens, n, width = streams.shape
        itemsize = streams.element_size()
        default = aggregate_backward_config(n, width, itemsize)
        name = "aggregate_backward" if need_streams else "aggregate_backward_of_pre"
        config = configured(name, n, width, streams.dtype, default)
        vector = vector_width(width, grad, streams)
        launch(
            aggregate_backward_kernel,
            (triton.cdiv(tokens, config.block_tokens),),
            grad,
            streams if need_pre else None,
            pre.contiguous() if need_streams else None,
            streams_grad,
            pre_grad,
            tokens,
            *strides_in(vector, grad),
            *strides_in(vector, streams),
            n=n,
            width=width,
            vector=vector,
            block_tokens=config.block_tokens,
            lanes=config.block_width * itemsize // VECTOR_BYTES,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return streams_grad, pre_grad


def aggregate_forward_config(n: int, width: int, itemsize: int) -> Config:
    """Four warps that share as few rows as the width allows, 16 bytes of each per thread."""
    return Config(*row_block(width, itemsize, warps=4), num_warps=4, num_stages=1)


def aggregate_backward_config(n: int, width: int, itemsize: int) -> Config:
    """A warp per token: sums over C need no shared memory, and addresses no vector registers."""
    return Config(1, WARP_BYTES // itemsize, num_warps=1, num_stages=1)


def sum_streams(name: str, streams: Tensor, pre: Tensor | None, scale: float) -> Tensor:
    tokens, n, width = streams.shape
    default = aggregate_forward_config(n, width, streams.element_size())
    config = configured(name, n, width, streams.dtype, default)
    vector = vector_width(width, streams)
    read = streams.new_empty(tokens, width)
    launch(
        aggregate_forward_kernel,
        (triton.cdiv(tokens, config.block_tokens) * triton.cdiv(width, config.block_width),),
        streams,
        None if pre is None else pre.contiguous(),
        read,
        tokens,
        *strides_in(vector, streams),
        scale=scale,
        n=n,
        width=width,
        vector=vector,
        block_tokens=config.block_tokens,
        block_width=config.block_width,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return read


@triton.jit(do_not_specialize=["tokens", "token_stride", "stream_stride"])
def aggregate_forward_kernel(
    streams_ptr,
    pre_ptr,  # None: every stream weighs `scale`
    read_ptr,
    tokens,
    token_stride,  # in units of `vector`, as all strides but the last
    stream_stride,
    width_stride,
    scale: tl.constexpr,
    n: tl.constexpr,
    width: tl.constexpr,
    vector: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
):
    token, column = row_chunk(tokens, width, block_tokens, block_width)
    row = token[:, None]
    mask = inside(row, column, tokens, width, block_width)
    at = pointers(streams_ptr, row, column, token_stride, width_stride, vector)
    tiles = load_streams(at, stream_stride, mask, n, vector)
    if pre_ptr is not None:
        weights = load_weights(pre_ptr, token, token < tokens, n)
    else:
        weights = ()
        for _ in tl.static_range(n):
            weights = weights + (scale,)
    total = weighted_sum(weights, tiles, n)
    tl.store(read_ptr + row * width + column, total.to(read_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "grad_token_stride", "token_stride", "stream_stride"])
def aggregate_backward_kernel(
    grad_ptr,
    streams_ptr,  # None unless pre_grad_ptr
    pre_ptr,  # None unless streams_grad_ptr
    streams_grad_ptr,  # None: not wanted
    pre_grad_ptr,  # None: not wanted
    tokens,
    grad_token_stride,  # in units of `vector`, as all strides but the last of a tensor
    grad_width_stride,
    token_stride,
    stream_stride,
    width_stride,
    n: tl.constexpr,
    width: tl.constexpr,
    vector: tl.constexpr,
    block_tokens: tl.constexpr,
    lanes: tl.constexpr,
):
    # Tiles are [tokens, lanes, vector]: a sum over the last axis stays inside a thread, and only
    # the [tokens, lanes] sums are added up across threads, once, after the loop.
    step: tl.constexpr = lanes * vector
    token = tl.program_id(0).to(tl.int64) * block_tokens + tl.arange(0, block_tokens)
    row = token[:, None, None]
    lane = tl.arange(0, lanes)[None, :, None] * vector + tl.arange(0, vector)[None, None, :]
    if streams_grad_ptr is not None:
        weights = load_weights(pre_ptr, token, token < tokens, n)
    sums = ()
    for _ in tl.static_range(n):
        sums = sums + (tl.zeros((block_tokens, lanes), tl.float32),)
    for start in range(0, width, step):
        column = start + lane
        mask = inside(row, column, tokens, width, step)
        from_grad = pointers(grad_ptr, row, column, grad_token_stride, grad_width_stride, vector)
        grad = tl.load(from_grad, mask=mask, other=0.0)
        if pre_grad_ptr is not None:
            from_streams = pointers(streams_ptr, row, column, token_stride, width_stride, vector)
            tiles = load_streams(from_streams, stream_stride, mask, n, vector)
        grad = grad.to(tl.float32)
        if streams_grad_ptr is not None:
            to_streams = streams_grad_ptr + row * (n * width) + column
            for j in tl.static_range(n):
                scaled = (weights[j][:, :, None] * grad).to(streams_grad_ptr.dtype.element_ty)
                tl.store(to_streams + j * width, scaled, mask=mask)
        if pre_grad_ptr is not None:
            more = ()
            for j in tl.static_range(n):
                more = more + (sums[j] + tl.sum(grad * tiles[j].to(tl.float32), axis=2),)
            sums = more
    if pre_grad_ptr is not None:
        store_sums(pre_grad_ptr, sums, token, tokens, n)
