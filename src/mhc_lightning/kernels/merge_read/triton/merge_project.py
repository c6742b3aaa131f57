"""Merging for one sub-layer, projecting and reading for the next, in one pass over the streams.

Forward, with the mappings of sub-layer l given (arXiv 2512.24880, eqs. 3 and 14–18):

    new[i] = Σ_j residual[i, j] · x[j] + post[i] · y
    raw = vec(new) · phi,   squares = Σ new²
    read = Σ_i pre[i] · new[i]

`pre` is either computed here from `raw` (mHC) or given (its single-pass variant). The first
takes (3n + 2)·C elements per token, the second (2n + 2)·C.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.triton_support.block_sizes import Config, configured
from mhc_lightning.kernels.triton_support.launch import launch
from mhc_lightning.kernels.triton_support.product_precision import product_precision
from mhc_lightning.kernels.triton_support.tiles import (
    load_stream_tiles,
    load_tile,
    load_weights,
    weighted_sum,
)


def merge_project(
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    pre: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Merge, then project and read for the next sub-layer.

    Args:
        streams: [T, n, C], any strides.
        output: The sub-layer's output [T, C], any strides.
        residual: [T, n, n] float32.
        post: [T, n] float32.
        phi: The next connection's [n·C, K], float32.
        alpha: The next connection's gates [3].
        bias: The next connection's [K].
        pre: Weights [T, n] to read the new streams with (single pass), or None to compute them.
        eps: Added to the mean square.

    Returns:
        New streams [T, n, C] and the next input [T, C] in the streams' dtype, raw coefficients
        [1, K, T] and sums of squares [1, T] in float32, as `project` returns them, and the
        weights [T, n] that the input was read with.
    """
    tokens, n, width = streams.shape
    coefficients = phi.shape[1]
    name = "merge_project" if pre is None else "merge_project_single_pass"
    default = merge_project_config(n, width, streams.element_size())
    config = configured(name, n, width, streams.dtype, default)
    new = torch.empty_like(streams, memory_format=torch.contiguous_format)
    read = streams.new_empty((tokens, width))
    raw = streams.new_empty((1, coefficients, tokens), dtype=torch.float32)
    squares = streams.new_empty((1, tokens), dtype=torch.float32)
    if pre is None:
        weights = streams.new_empty((tokens, n), dtype=torch.float32)
    else:
        weights = pre.contiguous()
    launch(
        merge_project_kernel,
        (triton.cdiv(tokens, config.block_tokens),),
        streams,
        output,
        residual.contiguous(),
        post.contiguous(),
        phi.contiguous(),
        alpha,
        bias,
        weights,
        new,
        read,
        raw,
        squares,
        tokens,
        eps,
        *streams.stride(),
        *output.stride(),
        n=n,
        width=width,
        count=coefficients,
        padded_count=max(16, triton.next_power_of_2(coefficients)),
        single_pass=pre is not None,
        block_tokens=config.block_tokens,
        block_width=config.block_width,
        precision=product_precision(streams),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return new, read, raw, squares, weights


def merge_project_config(n: int, width: int, itemsize: int) -> Config:
    """Tiles whose n + 1 operands and products stay in registers; phi is read per 64 tokens."""
    if itemsize == 4:
        return Config(block_tokens=16, block_width=32, num_warps=4, num_stages=1)
    return Config(block_tokens=64, block_width=32, num_warps=8, num_stages=3)


@triton.jit
def stored_stream(i: tl.constexpr, tiles, output, residual_ptr, post_ptr, token, in_tokens, dtype: tl.constexpr):  # fmt: skip  # noqa: E501
    """Stream i after the merge [BT, BC], rounded as it is stored, in float32.

    Weights are loaded where they are used: they come from the cache, and registers are scarce.
    """
    n: tl.constexpr = len(tiles)
    weight = tl.load(post_ptr + token * n + i, mask=in_tokens, other=0.0)
    merged = weight[:, None] * output.to(tl.float32)
    for j in tl.static_range(n):
        weight = tl.load(residual_ptr + token * (n * n) + i * n + j, mask=in_tokens, other=0.0)
        merged += weight[:, None] * tiles[j].to(tl.float32)
    return merged.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "eps"])
def merge_project_kernel(
    streams_ptr,
    output_ptr,
    residual_ptr,
    post_ptr,
    phi_ptr,
    alpha_ptr,
    bias_ptr,
    pre_ptr,
    new_ptr,
    read_ptr,
    raw_ptr,
    squares_ptr,
    tokens,
    eps,
    token_stride,
    stream_stride,
    width_stride,
    output_token_stride,
    output_width_stride,
    n: tl.constexpr,
    width: tl.constexpr,
    count: tl.constexpr,
    padded_count: tl.constexpr,
    single_pass: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
    precision: tl.constexpr,
):
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    in_tokens = token < tokens
    token = token.to(tl.int64)
    lane = tl.arange(0, block_width)
    k = tl.arange(0, padded_count)
    in_k = k < count
    dtype: tl.constexpr = new_ptr.dtype.element_ty
    weights = ()
    if single_pass:
        weights = load_weights(pre_ptr, token, in_tokens, n)

    products = tl.zeros((block_tokens, padded_count), tl.float32)
    square = tl.zeros((block_tokens,), tl.float32)
    for start in tl.range(0, width, block_width):
        channel = start + lane
        in_channels = channel < width
        in_tile = in_tokens[:, None] & in_channels[None, :]
        output = load_tile(
            output_ptr, token, channel, output_token_stride, output_width_stride, in_tile
        )
        tiles = load_stream_tiles(
            streams_ptr, token, channel, token_stride, stream_stride, width_stride, in_tile, n
        )
        total = tl.zeros((block_tokens, block_width), tl.float32)
        for i in tl.static_range(n):
            merged = stored_stream(
                i, tiles, output, residual_ptr, post_ptr, token, in_tokens, dtype
            )
            target = new_ptr + token[:, None] * (n * width) + i * width + channel[None, :]
            tl.store(target, merged.to(dtype), mask=in_tile)
            phi_rows = tl.load(
                phi_ptr + (i * width + channel)[:, None] * count + k[None, :],
                mask=in_channels[:, None] & in_k[None, :],
                other=0.0,
            )
            products = tl.dot(merged, phi_rows, products, input_precision=precision)
            square += tl.sum(merged * merged, 1)
            if single_pass:
                total += weights[i] * merged
        if single_pass:
            tl.store(
                read_ptr + token[:, None] * width + channel[None, :], total.to(dtype), mask=in_tile
            )
    out = raw_ptr + k[None, :].to(tl.int64) * tokens + token[:, None]
    tl.store(out, products, mask=in_tokens[:, None] & in_k[None, :])
    tl.store(squares_ptr + token, square, mask=in_tokens)

    if not single_pass:
        gate = tl.rsqrt(square / (n * width) + eps) * tl.load(alpha_ptr)
        for i in tl.static_range(n):
            raw_pre = tl.sum(tl.where((k == i)[None, :], products, 0.0), 1)
            weight = tl.sigmoid(gate * raw_pre + tl.load(bias_ptr + i))
            tl.store(pre_ptr + token * n + i, weight, mask=in_tokens)
            weights = weights + (weight[:, None],)
        # The streams just written are read again, by other threads of this program.
        tl.debug_barrier()
        for start in tl.range(0, width, block_width):
            channel = start + lane
            in_tile = in_tokens[:, None] & (channel < width)[None, :]
            tiles = ()
            for i in tl.static_range(n):
                source = new_ptr + token[:, None] * (n * width) + i * width + channel[None, :]
                tiles = tiles + (tl.load(source, mask=in_tile, other=0.0),)
            total = weighted_sum(weights, tiles, n)
            tl.store(
                read_ptr + token[:, None] * width + channel[None, :], total.to(dtype), mask=in_tile
            )
