"""The projection `x · phi` and `Σ x²` in one read of x (arXiv 2512.24880, eqs. 14–15)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.triton_support.block_sizes import Config, configured
from mhc_lightning.kernels.triton_support.launch import launch
from mhc_lightning.kernels.triton_support.product_precision import product_precision
from mhc_lightning.kernels.triton_support.target import target_of

# Enough programs for two on each multiprocessor of the largest chips; short batches are split
# along C until there are that many, or until partial sums are this share of what is read.
_PROGRAMS = 264
_SHARE_OF_PARTIALS = 1 / 32


def project(streams: Tensor, phi: Tensor, per_stream: bool = False) -> tuple[Tensor, Tensor]:
    """Multiply the flattened streams of every token, or each stream by itself, by `phi`.

    Args:
        streams: [T, n, C], any strides.
        phi: [n·C, K] float32 contiguous, or [C, K] with `per_stream`.
        per_stream: True if each of the T·n streams is a row of its own (HC).

    Returns:
        Partial products [S, K, rows] and partial sums of squares [S, rows], float32, to be summed
        over S; rows are T, or T·n with `per_stream`.
    """
    tokens, n, width = streams.shape
    coefficients = phi.shape[1]
    rows = tokens * n if per_stream else tokens
    streams_per_row = 1 if per_stream else n
    name = "project_per_stream" if per_stream else "project"
    capability = target_of(streams).capability
    default = project_config(n, width, streams.element_size(), capability)
    config = configured(name, n, width, streams.dtype, default)
    block_width = min(config.block_width, max(16, triton.next_power_of_2(width)))
    row_blocks = triton.cdiv(rows, config.block_tokens)
    chunks = streams_per_row * triton.cdiv(width, block_width)
    row_bytes = streams_per_row * width * streams.element_size()
    most_splits = int(_SHARE_OF_PARTIALS * row_bytes / (4 * (coefficients + 1)))
    splits = max(1, min(most_splits, _PROGRAMS // max(row_blocks, 1)))
    chunks_per_split = triton.cdiv(chunks, splits)
    splits = triton.cdiv(chunks, chunks_per_split)
    raw = streams.new_empty((splits, coefficients, rows), dtype=torch.float32)
    squares = streams.new_empty((splits, rows), dtype=torch.float32)
    launch(
        project_kernel,
        (row_blocks, splits),
        streams,
        phi,
        raw,
        squares,
        rows,
        chunks_per_split,
        *streams.stride(),
        rows_per_token=n if per_stream else 1,
        streams_per_row=streams_per_row,
        width=width,
        count=coefficients,
        padded_count=max(16, triton.next_power_of_2(coefficients)),
        block_rows=config.block_tokens,
        block_width=block_width,
        precision=product_precision(streams),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return raw, squares


def project_config(n: int, width: int, itemsize: int, capability: int = 90) -> Config:
    """Tiles that keep about 100 KB in flight per multiprocessor and read phi once per 128 rows."""
    if itemsize == 4 and capability >= 100:
        warps = 8 if n <= 2 else 4
        return Config(block_tokens=64, block_width=32, num_warps=warps, num_stages=2)
    if itemsize == 4:
        return Config(block_tokens=32, block_width=32, num_warps=4, num_stages=3)
    if n * n + 2 * n > 64:
        return Config(block_tokens=64, block_width=32, num_warps=4, num_stages=3)
    return Config(block_tokens=128, block_width=64, num_warps=8, num_stages=4)


@triton.jit(do_not_specialize=["rows", "chunks_per_split"])
def project_kernel(
    streams_ptr,
    phi_ptr,
    raw_ptr,
    squares_ptr,
    rows,
    chunks_per_split,
    token_stride,
    stream_stride,
    width_stride,
    rows_per_token: tl.constexpr,
    streams_per_row: tl.constexpr,
    width: tl.constexpr,
    count: tl.constexpr,
    padded_count: tl.constexpr,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
    precision: tl.constexpr,
):
    """Rows [rows, streams_per_row · C] times phi: raw [splits, K, rows], squares [splits, rows].

    A row is a whole token (mHC) or one stream of it (HC).
    """
    split = tl.program_id(1)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    lane = tl.arange(0, block_width)
    k = tl.arange(0, padded_count)
    in_rows = row < rows
    in_k = k < count
    token = (row // rows_per_token).to(tl.int64)
    row_start = (
        streams_ptr + token * token_stride + (row % rows_per_token).to(tl.int64) * stream_stride
    )

    chunks_per_stream: tl.constexpr = (width + block_width - 1) // block_width
    first = split * chunks_per_split
    last = tl.minimum(first + chunks_per_split, streams_per_row * chunks_per_stream)
    products = tl.zeros((block_rows, padded_count), tl.float32)
    square = tl.zeros((block_rows,), tl.float32)
    for chunk in tl.range(first, last):
        stream = chunk // chunks_per_stream
        channel = (chunk % chunks_per_stream) * block_width + lane
        in_channels = channel < width
        x = tl.load(  # [rows, BC]
            row_start[:, None]
            + stream.to(tl.int64) * stream_stride
            + (channel.to(tl.int64) * width_stride)[None, :],
            mask=in_rows[:, None] & in_channels[None, :],
            other=0.0,
        ).to(tl.float32)
        weights = tl.load(  # [BC, K]
            phi_ptr + (stream * width + channel)[:, None] * count + k[None, :],
            mask=in_channels[:, None] & in_k[None, :],
            other=0.0,
        )
        products = tl.dot(x, weights, products, input_precision=precision)
        square += tl.sum(x * x, 1)
    out = raw_ptr + (split * count + k)[None, :].to(tl.int64) * rows + row[:, None]
    tl.store(out, products, mask=in_rows[:, None] & in_k[None, :])
    tl.store(squares_ptr + split.to(tl.int64) * rows + row, square, mask=in_rows)
