"""Across the seam of two sub-layers: merge the one's output, project and read for the other.

Forward, with the mappings of sub-layer l given (arXiv 2512.24880, eqs. 3 and 14–18):

    new[i] = Σ_j residual[i, j] · x[j] + post[i] · y
    raw = vec(new) · phi,   squares = Σ new²
    read = Σ_i pre[i] · new[i]

``pre`` is either computed here from ``raw`` (mHC) or given (its single-pass variant). The first
takes (3n + 2)·C elements per token, the second (2n + 2)·C.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.triton_support.block_sizes import Config, configured
from mhc_lightning.kernels.triton_support.launch import launch
from mhc_lightning.kernels.triton_support.product_precision import product_precision


@triton.jit
def merged_stream(i: tl.constexpr, xs, y, residual, post, t, in_t, dtype: tl.constexpr):
    """Stream i behind the merge, rounded as it is stored, in float32.

    Weights are loaded where they are used: they come from the cache, and registers are scarce.
    """
    n: tl.constexpr = len(xs)
    merged = tl.load(post + t * n + i, mask=in_t, other=0.0)[:, None] * y.to(tl.float32)
    for j in tl.static_range(n):
        weight = tl.load(residual + t * (n * n) + i * n + j, mask=in_t, other=0.0)
        merged += weight[:, None] * xs[j].to(tl.float32)
    return merged.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "eps"])
def _merge_project(
    streams,
    output,
    residual,
    post,
    phi,
    alpha,
    bias,
    pre,
    new,
    read,
    raw,
    squares,
    tokens,
    eps,
    stride_token,
    stride_stream,
    stride_channel,
    output_stride_token,
    output_stride_channel,
    N: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_t = t < tokens
    t = t.to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    k = tl.arange(0, PADDED_K)
    in_k = k < K
    dtype: tl.constexpr = new.dtype.element_ty
    weights = ()
    if SINGLE_PASS:
        for i in tl.static_range(N):
            weights = weights + (tl.load(pre + t * N + i, mask=in_t, other=0.0),)

    products = tl.zeros((BLOCK_TOKENS, PADDED_K), tl.float32)
    square = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        c = start + channel
        in_c = c < C
        in_tile = in_t[:, None] & in_c[None, :]
        y = tl.load(
            output
            + t[:, None] * output_stride_token
            + (c.to(tl.int64) * output_stride_channel)[None, :],
            mask=in_tile,
            other=0.0,
        )
        xs = ()
        for j in tl.static_range(N):
            x = tl.load(
                streams
                + t[:, None] * stride_token
                + tl.cast(j, tl.int64) * stride_stream
                + (c.to(tl.int64) * stride_channel)[None, :],
                mask=in_tile,
                other=0.0,
            )
            xs = xs + (x,)
        total = tl.zeros((BLOCK_TOKENS, BLOCK_C), tl.float32)
        for i in tl.static_range(N):
            merged = merged_stream(i, xs, y, residual, post, t, in_t, dtype)
            target = new + t[:, None] * (N * C) + i * C + c[None, :]
            tl.store(target, merged.to(dtype), mask=in_tile)
            phi_rows = tl.load(
                phi + (i * C + c)[:, None] * K + k[None, :],
                mask=in_c[:, None] & in_k[None, :],
                other=0.0,
            )
            products = tl.dot(merged, phi_rows, products, input_precision=PRECISION)
            square += tl.sum(merged * merged, 1)
            if SINGLE_PASS:
                total += weights[i][:, None] * merged
        if SINGLE_PASS:
            tl.store(read + t[:, None] * C + c[None, :], total.to(dtype), mask=in_tile)
    out = raw + k[None, :].to(tl.int64) * tokens + t[:, None]
    tl.store(out, products, mask=in_t[:, None] & in_k[None, :])
    tl.store(squares + t, square, mask=in_t)

    if not SINGLE_PASS:
        gate = tl.rsqrt(square / (N * C) + eps) * tl.load(alpha)
        for i in tl.static_range(N):
            raw_pre = tl.sum(tl.where((k == i)[None, :], products, 0.0), 1)
            weights = weights + (tl.sigmoid(gate * raw_pre + tl.load(bias + i)),)
            tl.store(pre + t * N + i, weights[i], mask=in_t)
        # The streams just written are read again, by other threads of this program.
        tl.debug_barrier()
        for start in tl.range(0, C, BLOCK_C):
            c = start + channel
            in_tile = in_t[:, None] & (c < C)[None, :]
            total = tl.zeros((BLOCK_TOKENS, BLOCK_C), tl.float32)
            for i in tl.static_range(N):
                source = new + t[:, None] * (N * C) + i * C + c[None, :]
                merged = tl.load(source, mask=in_tile, other=0.0).to(tl.float32)
                total += weights[i][:, None] * merged
            tl.store(read + t[:, None] * C + c[None, :], total.to(dtype), mask=in_tile)


def merge_project_config(n: int, width: int, itemsize: int) -> Config:
    """Tiles whose n + 1 operands and products stay in registers; phi is read per 64 tokens."""
    if itemsize == 4:
        return Config(block_tokens=16, block_width=32, num_warps=4, num_stages=1)
    return Config(block_tokens=64, block_width=32, num_warps=8, num_stages=3)


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
        [1, K, T] and sums of squares [1, T] in float32, as ``project`` returns them, and the
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
        _merge_project,
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
        N=n,
        C=width,
        K=coefficients,
        PADDED_K=max(16, triton.next_power_of_2(coefficients)),
        SINGLE_PASS=pre is not None,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_C=config.block_width,
        PRECISION=product_precision(streams),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return new, read, raw, squares, weights
