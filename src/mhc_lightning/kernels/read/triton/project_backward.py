"""Backward of reading: everything that reaches the streams, and phi's gradient, in one pass.

    grad x[i] = kept_grad[i] + pre[i] · read_grad + raw_grad · phi[i]ᵀ + scale · x[i]
    grad phi[i] = Σ_tokens x[i]ᵀ · raw_grad

A program owns a block of channels of all streams and walks over a range of tokens, so that its
part of phi and of phi's gradient stays on the chip.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.triton_support.block_sizes import Config, configured
from mhc_lightning.kernels.triton_support.launch import launch
from mhc_lightning.kernels.triton_support.product_precision import product_precision
from mhc_lightning.kernels.triton_support.target import target_of
from mhc_lightning.kernels.triton_support.tiles import load_stream_tile, load_tile

_PROGRAMS = 264
# Below this many tokens a range's partial sum of phi's gradient costs more than it parallelises.
_LEAST_TOKENS = 1024


def project_backward(
    streams: Tensor,
    phi: Tensor,
    raw_grad: Tensor,
    scale: Tensor,
    pre: Tensor,
    read_grad: Tensor | None,
    kept_grad: Tensor | None,
    need_streams: bool,
    need_phi: bool,
    per_stream: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the streams and of phi.

    Args:
        streams: [T, n, C], any strides.
        phi: [n·C, K] float32 contiguous, or [C, K] with `per_stream`.
        raw_grad: Gradient of the raw coefficients [K, T], or [K, T·n] with `per_stream`.
        scale: Factor of x in the gradient that comes through the norm [T], or [T·n].
        pre: [T, n].
        read_grad: Gradient of the sub-layer's input [T, C], or None if there is none.
        kept_grad: Gradient that comes from the merge [T, n, C], or None.
        need_streams: True if the streams' gradient is asked for.
        need_phi: True if phi's gradient is asked for.
        per_stream: True if each stream has coefficients of its own (HC).

    Returns:
        The streams' gradient [T, n, C] in their dtype and phi's in float32, None where not needed.
    """
    if not (need_streams or need_phi):
        return None, None
    tokens, n, width = streams.shape
    coefficients = phi.shape[1]
    name = "project_backward_per_stream" if per_stream else "project_backward"
    backend = target_of(streams).backend
    default = project_backward_config(n, width, streams.element_size(), backend, per_stream)
    config = configured(name, n, width, streams.dtype, default)
    channel_blocks = triton.cdiv(width, config.block_width)
    ranges, per_range = ranges_of_tokens(tokens, channel_blocks, config.block_tokens)
    streams_grad = streams.new_empty(streams.shape) if need_streams else None
    partials = None
    if need_phi:
        shape = (ranges, phi.shape[0] // width, coefficients, width)
        partials = streams.new_empty(shape, dtype=torch.float32)
    main, rest = padded_parts(coefficients)
    group = n if per_stream else streams_per_program(n, streams.element_size())
    # Any pointer will do for an operand that is not there: the kernel does not touch it.
    read_operand = streams if read_grad is None else read_grad
    kept_operand = streams if kept_grad is None else kept_grad
    launch(
        project_backward_kernel,
        (channel_blocks, ranges, triton.cdiv(n, group)),
        streams,
        phi,
        raw_grad,
        scale,
        pre,
        read_operand,
        kept_operand,
        streams_grad,
        partials,
        tokens,
        per_range,
        *streams.stride(),
        read_operand.stride(0),
        read_operand.stride(-1),
        *kept_operand.stride(),
        n=n,
        group=group,
        width=width,
        count=coefficients,
        main_count=main,
        rest_count=rest,
        per_stream=per_stream,
        has_read=read_grad is not None,
        has_kept=kept_grad is not None,
        need_streams=need_streams,
        need_phi=need_phi,
        block_tokens=config.block_tokens,
        block_width=config.block_width,
        precision=product_precision(streams),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if partials is None:
        return streams_grad, None
    return streams_grad, partials.sum(0).mT.reshape(phi.shape).contiguous()


def project_backward_config(
    n: int, width: int, itemsize: int, backend: str = "cuda", per_stream: bool = False
) -> Config:
    """As many channels as leave phi and its gradient room in the registers of a program.

    With half as many warps, each has twice the registers on AMD's chips.
    """
    if n > 4 or itemsize == 4:
        on_amd = backend == "hip"
        wide = 32 if on_amd or (n > 4 and not (per_stream and itemsize == 2)) else 64
        warps = 4 if n > 4 and on_amd else 8
        return Config(block_tokens=16, block_width=wide, num_warps=warps, num_stages=1)
    return Config(block_tokens=16, block_width=64, num_warps=4, num_stages=2)


def ranges_of_tokens(
    tokens: int, channel_blocks: int, block_tokens: int, least: int = _LEAST_TOKENS
) -> tuple[int, int]:
    """Split the tokens so that all multiprocessors work: (ranges, tokens per range)."""
    ranges = max(1, min(tokens // least, _PROGRAMS // channel_blocks))
    per_range = triton.cdiv(triton.cdiv(max(tokens, 1), ranges), block_tokens) * block_tokens
    return max(1, triton.cdiv(tokens, per_range)), per_range


def streams_per_program(n: int, itemsize: int) -> int:
    """Number of streams whose phi and gradient of phi fit the registers of a program.

    All of up to 4. For more, `read_grad` is read once per 4 streams, or per 2 of float32, whose
    products take twice the registers.
    """
    return n if n <= 4 else 8 // itemsize


def padded_parts(coefficients: int) -> tuple[int, int]:
    """Split a number of columns in two powers of two if they need less padding than one does.

    Products take powers of two of at least 16: 80 columns are 64 and 16 instead of 128.

    Args:
        coefficients: K.

    Returns:
        Widths of both parts; the second is 0 if there is but one.
    """
    whole = max(16, triton.next_power_of_2(coefficients))
    rest = max(16, triton.next_power_of_2(coefficients - whole // 2))
    return (whole // 2, rest) if whole // 2 >= 16 and rest < whole // 2 else (whole, 0)


@triton.jit(do_not_specialize=["tokens", "tokens_per_range"])
def project_backward_kernel(
    streams_ptr,
    phi_ptr,
    raw_grad_ptr,
    scale_ptr,
    pre_ptr,
    read_grad_ptr,
    kept_grad_ptr,
    streams_grad_ptr,
    phi_grad_ptr,
    tokens,
    tokens_per_range,
    token_stride,
    stream_stride,
    width_stride,
    read_grad_token_stride,
    read_grad_width_stride,
    kept_grad_token_stride,
    kept_grad_stream_stride,
    kept_grad_width_stride,
    n: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    count: tl.constexpr,
    main_count: tl.constexpr,
    rest_count: tl.constexpr,
    per_stream: tl.constexpr,
    has_read: tl.constexpr,
    has_kept: tl.constexpr,
    need_streams: tl.constexpr,
    need_phi: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
    precision: tl.constexpr,
):
    token_range = tl.program_id(1)
    channel = tl.program_id(0) * block_width + tl.arange(0, block_width)
    in_channels = channel < width
    # A program's streams are `first_stream` and the next ones, the last one's fewer than `group`.
    first_stream = 0 if group == n else tl.program_id(2) * group
    raw_rows: tl.constexpr = n if per_stream else 1
    parts: tl.constexpr = 2 if rest_count else 1  # of the coefficients, see `padded_parts`

    weights = ()
    phi_sums = ()
    for j in tl.static_range(1 if per_stream else group):
        i = first_stream + j
        for part in tl.static_range(parts):
            k = part * main_count + tl.arange(0, rest_count if part else main_count)
            if need_streams:
                row = phi_ptr + (i * width + channel)[:, None] * count + k[None, :]
                in_phi = in_channels[:, None] & (k < count)[None, :]
                if n % group:
                    in_phi = in_phi & (i + tl.zeros_like(k) < n)[None, :]
                weights = weights + (tl.load(row, mask=in_phi, other=0.0),)
            phi_sums = phi_sums + (tl.zeros((block_width, k.shape[0]), tl.float32),)

    first = token_range * tokens_per_range
    last = tl.minimum(first + tokens_per_range, tokens)
    for start in tl.range(first, last, block_tokens):
        token = start + tl.arange(0, block_tokens)
        in_tokens = token < last
        in_block = in_tokens[:, None] & in_channels[None, :]
        token = token.to(tl.int64)
        if has_read:
            read_grad = load_tile(
                read_grad_ptr,
                token,
                channel,
                read_grad_token_stride,
                read_grad_width_stride,
                in_block,
            ).to(tl.float32)
        sums = ()
        for j in tl.static_range(group):
            i = first_stream + j
            in_tile = (
                in_block & (i + tl.zeros_like(channel) < n)[None, :] if n % group else in_block
            )
            in_pre = in_tokens & (i + tl.zeros_like(token) < n) if n % group else in_tokens
            row_of_raw = token * raw_rows + (i if per_stream else 0)
            if per_stream or j == 0:
                raw = ()
                for part in tl.static_range(parts):
                    k = part * main_count + tl.arange(0, rest_count if part else main_count)
                    columns = raw_grad_ptr + k[None, :].to(tl.int64) * (tokens * raw_rows)
                    in_raw = in_tokens[:, None] & (k < count)[None, :]
                    raw = raw + (tl.load(columns + row_of_raw[:, None], mask=in_raw, other=0.0),)
            x = load_stream_tile(
                streams_ptr, token, i, channel, token_stride, stream_stride, width_stride, in_tile
            ).to(tl.float32)
            if need_phi:
                more = ()
                for part in tl.static_range(parts):
                    if per_stream:
                        so_far = phi_sums[0] if j == 0 else sums[0]
                    else:
                        so_far = phi_sums[j * parts + part]
                    product = tl.dot(tl.trans(x), raw[part], so_far, input_precision=precision)
                    more = more + (product,)
                sums = more if per_stream else sums + more
            if need_streams:
                norm = tl.load(scale_ptr + row_of_raw, mask=in_tokens, other=0.0)
                grad = norm[:, None] * x
                if has_read:
                    grad += (
                        tl.load(pre_ptr + token * n + i, mask=in_pre, other=0.0)[:, None]
                        * read_grad
                    )
                if has_kept:
                    grad += load_stream_tile(
                        kept_grad_ptr,
                        token,
                        i,
                        channel,
                        kept_grad_token_stride,
                        kept_grad_stream_stride,
                        kept_grad_width_stride,
                        in_tile,
                    ).to(tl.float32)
                for part in tl.static_range(parts):
                    phi_rows = tl.trans(weights[(0 if per_stream else j) * parts + part])
                    grad += tl.dot(raw[part], phi_rows, input_precision=precision)
                tl.store(
                    streams_grad_ptr + token[:, None] * (n * width) + i * width + channel[None, :],
                    grad.to(streams_grad_ptr.dtype.element_ty),
                    mask=in_tile,
                )
        if need_phi:
            phi_sums = sums

    if need_phi:
        # By columns: the offsets of phi's rows would else be kept in registers until here.
        phi_rows_of_range: tl.constexpr = width if per_stream else n * width
        partial = phi_grad_ptr + token_range.to(tl.int64) * (phi_rows_of_range * count)
        for j in tl.static_range(1 if per_stream else group):
            i = first_stream + j
            for part in tl.static_range(parts):
                k = part * main_count + tl.arange(0, rest_count if part else main_count)
                out = partial + (i * count + k)[:, None] * width + channel[None, :]
                in_phi = (k < count)[:, None] & in_channels[None, :]
                if n % group:
                    in_phi = in_phi & (i + tl.zeros_like(k) < n)[:, None]
                tl.store(out, tl.trans(phi_sums[j * parts + part]), mask=in_phi)
