"""Mixing the streams and writing a sub-layer's output to them in one pass, and the gradients."""

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
    merged_stream,
    pointers,
    row_block,
    row_chunk,
    store_sums,
    strides_in,
    vector_width,
)


def merge_forward(streams: Tensor, output: Tensor, residual: Tensor, post: Tensor) -> Tensor:
    """`new[i] = Σ_j residual[i, j] · streams[j] + post[i] · output` (arXiv 2512.24880, eq. 3).

    Args:
        streams: [tokens, n, C], any strides.
        output: [tokens, C], any strides.
        residual: [tokens, n, n], float32.
        post: [tokens, n], float32.

    Returns:
        [tokens, n, C], contiguous, in the dtype of `streams`.
    """
    tokens, n, width = streams.shape
    default = merge_forward_config(n, width, streams.element_size())
    config = configured("merge_forward", n, width, streams.dtype, default)
    vector = vector_width(width, streams, output)
    merged = streams.new_empty(streams.shape)
    launch(
        merge_forward_kernel,
        (triton.cdiv(tokens, config.block_tokens) * triton.cdiv(width, config.block_width),),
        streams,
        output,
        residual.contiguous(),
        post.contiguous(),
        merged,
        tokens,
        *strides_in(vector, streams),
        *strides_in(vector, output),
        n=n,
        width=width,
        vector=vector,
        block_tokens=config.block_tokens,
        block_width=config.block_width,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return merged


def merge_backward(
    grad: Tensor,
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    need_streams: bool,
    need_output: bool,
    need_coefficients: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """All gradients of `merge_forward`; each stream-sized tensor is read or written once.

    Args:
        grad: Gradient of the new streams [tokens, n, C], any strides.
        streams: [tokens, n, C], any strides; not read unless `need_coefficients`.
        output: [tokens, C], any strides; not read unless `need_coefficients`.
        residual: [tokens, n, n], float32.
        post: [tokens, n], float32.
        need_streams: True if the first result is wanted.
        need_output: True if the second result is wanted.
        need_coefficients: True if the third and the fourth are wanted.

    Returns:
        Gradients of the streams, the output (contiguous, in their dtypes), `residual` and
        `post` (float32); None where not needed.
    """
    tokens, n, width = streams.shape
    default = merge_backward_config(n, width, streams.element_size())
    config = configured("merge_backward", n, width, streams.dtype, default)
    streams_grad = streams.new_empty(streams.shape) if need_streams else None
    output_grad = output.new_empty(output.shape) if need_output else None
    residual_grad = post_grad = None
    if need_coefficients:
        residual_grad = torch.empty_like(residual, memory_format=torch.contiguous_format)
        post_grad = torch.empty_like(post, memory_format=torch.contiguous_format)
    if need_streams or need_output or need_coefficients:
        vector = vector_width(width, streams, grad, output)
        launch(
            merge_backward_kernel,
            (triton.cdiv(tokens, config.block_tokens),),
            grad,
            streams,
            output,
            residual.contiguous(),
            post.contiguous(),
            streams_grad,
            output_grad,
            residual_grad,
            post_grad,
            tokens,
            *strides_in(vector, grad),
            *strides_in(vector, streams),
            *strides_in(vector, output),
            n=n,
            width=width,
            vector=vector,
            block_tokens=config.block_tokens,
            lanes=config.block_width * streams.element_size() // VECTOR_BYTES,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return streams_grad, output_grad, residual_grad, post_grad


def merge_forward_config(n: int, width: int, itemsize: int) -> Config:
    """Four warps that share as few rows as the width allows, 16 bytes of each per thread."""
    return Config(*row_block(width, itemsize, warps=4), num_warps=4, num_stages=1)


def merge_backward_config(n: int, width: int, itemsize: int) -> Config:
    """A warp per token: sums over C need no shared memory, and addresses no vector registers."""
    return Config(1, WARP_BYTES // itemsize, num_warps=1, num_stages=1)


@triton.jit(do_not_specialize=["tokens", "token_stride", "stream_stride", "output_token_stride"])
def merge_forward_kernel(
    streams_ptr,
    output_ptr,
    residual_ptr,
    post_ptr,
    merged_ptr,
    tokens,
    token_stride,  # in units of `vector`, as all strides but the last of a tensor
    stream_stride,
    width_stride,
    output_token_stride,
    output_width_stride,
    n: tl.constexpr,
    width: tl.constexpr,
    vector: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
):
    token, column = row_chunk(tokens, width, block_tokens, block_width)
    in_tokens = token < tokens
    row = token[:, None]
    mask = inside(row, column, tokens, width, block_width)
    at = pointers(streams_ptr, row, column, token_stride, width_stride, vector)
    tiles = load_streams(at, stream_stride, mask, n, vector)
    at = pointers(output_ptr, row, column, output_token_stride, output_width_stride, vector)
    output = tl.load(at, mask=mask, other=0.0)
    # All weights before the first store: what follows a store cannot be loaded ahead of it.
    post = load_weights(post_ptr, token, in_tokens, n)
    residual = load_weights(residual_ptr, token, in_tokens, n * n)
    for i in tl.static_range(n):
        total = merged_stream(i, tiles, output, residual, post, n)
        at = merged_ptr + row * (n * width) + i * width + column
        tl.store(at, total.to(merged_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "grad_token_stride",
        "grad_stream_stride",
        "token_stride",
        "stream_stride",
        "output_token_stride",
    ]
)
def merge_backward_kernel(
    grad_ptr,
    streams_ptr,
    output_ptr,
    residual_ptr,
    post_ptr,
    streams_grad_ptr,  # None: not wanted, as all four
    output_grad_ptr,
    residual_grad_ptr,
    post_grad_ptr,
    tokens,
    grad_token_stride,  # in units of `vector`, as all strides but the last of a tensor
    grad_stream_stride,
    grad_width_stride,
    token_stride,
    stream_stride,
    width_stride,
    output_token_stride,
    output_width_stride,
    n: tl.constexpr,
    width: tl.constexpr,
    vector: tl.constexpr,
    block_tokens: tl.constexpr,
    lanes: tl.constexpr,
):
    # Tiles are [tokens, lanes, vector]: a sum over the last axis stays inside a thread, and only
    # the [tokens, lanes] sums are added up across threads, once, after the loop.
    step: tl.constexpr = lanes * vector
    # From six streams on, the registers hold neither the mixing matrix throughout nor all of both
    # operands at once: entries are loaded where they are used, and the streams after the gradients.
    crowded: tl.constexpr = n > 5
    token = tl.program_id(0).to(tl.int64) * block_tokens + tl.arange(0, block_tokens)
    in_tokens = token < tokens
    row = token[:, None, None]
    lane = tl.arange(0, lanes)[None, :, None] * vector + tl.arange(0, vector)[None, None, :]
    if output_grad_ptr is not None:
        post = load_weights(post_ptr, token, in_tokens, n)
    if streams_grad_ptr is not None and not crowded:
        residual = load_weights(residual_ptr, token, in_tokens, n * n)
    residual_sums = ()  # by columns
    post_sums = ()
    for _ in tl.static_range(n):
        post_sums = post_sums + (tl.zeros((block_tokens, lanes), tl.float32),)
        for _ in tl.static_range(n):
            residual_sums = residual_sums + (tl.zeros((block_tokens, lanes), tl.float32),)
    for start in range(0, width, step):
        column = start + lane
        mask = inside(row, column, tokens, width, step)
        from_grad = pointers(grad_ptr, row, column, grad_token_stride, grad_width_stride, vector)
        grads = load_streams(from_grad, grad_stream_stride, mask, n, vector)
        if residual_grad_ptr is not None:
            from_output = pointers(
                output_ptr, row, column, output_token_stride, output_width_stride, vector
            )
            output = tl.load(from_output, mask=mask, other=0.0)
            from_streams = pointers(streams_ptr, row, column, token_stride, width_stride, vector)
            if not crowded:
                tiles = load_streams(from_streams, stream_stride, mask, n, vector)
        if output_grad_ptr is not None:
            total = tl.zeros((block_tokens, lanes, vector), tl.float32)
            for i in tl.static_range(n):
                total += post[i][:, :, None] * grads[i].to(tl.float32)
            to_output = output_grad_ptr + row * width + column
            tl.store(to_output, total.to(output_grad_ptr.dtype.element_ty), mask=mask)
        if streams_grad_ptr is not None:
            for j in tl.static_range(n):
                total = tl.zeros((block_tokens, lanes, vector), tl.float32)
                for i in tl.static_range(n):
                    if crowded:
                        at = residual_ptr + token * (n * n) + (i * n + j)
                        entry = tl.load(at, mask=in_tokens, other=0.0)[:, None, None]
                    else:
                        entry = residual[i * n + j][:, :, None]
                    total += entry * grads[i].to(tl.float32)
                to_stream = streams_grad_ptr + row * (n * width) + j * width + column
                tl.store(to_stream, total.to(streams_grad_ptr.dtype.element_ty), mask=mask)
        if residual_grad_ptr is not None:
            more_post = ()
            more_residual = ()
            for i in tl.static_range(n):
                more = tl.sum(grads[i].to(tl.float32) * output.to(tl.float32), axis=2)
                more_post = more_post + (post_sums[i] + more,)
            for j in tl.static_range(n):
                if crowded:
                    offset = j * stream_stride.to(tl.int64) * vector
                    tile = tl.load(from_streams + offset, mask=mask, other=0.0)
                else:
                    tile = tiles[j]
                for i in tl.static_range(n):
                    more = tl.sum(grads[i].to(tl.float32) * tile.to(tl.float32), axis=2)
                    more_residual = more_residual + (residual_sums[j * n + i] + more,)
            post_sums = more_post
            residual_sums = more_residual
    if residual_grad_ptr is not None:
        rows = ()
        for i in tl.static_range(n):
            for j in tl.static_range(n):
                rows = rows + (residual_sums[j * n + i],)
        store_sums(residual_grad_ptr, rows, token, tokens, n * n)
        store_sums(post_grad_ptr, post_sums, token, tokens, n)
