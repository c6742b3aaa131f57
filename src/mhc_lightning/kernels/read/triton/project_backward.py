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

_PROGRAMS = 264
# Below this many tokens a range's partial sum of phi's gradient costs more than it parallelises.
_LEAST_TOKENS = 1024


@triton.jit(do_not_specialize=["tokens", "tokens_per_range"])
def _project_backward(
    streams,
    phi,
    raw_grad,
    scale,
    pre,
    read_grad,
    kept_grad,
    streams_grad,
    phi_grad,
    tokens,
    tokens_per_range,
    stride_token,
    stride_stream,
    stride_channel,
    read_stride_token,
    read_stride_channel,
    kept_stride_token,
    kept_stride_stream,
    kept_stride_channel,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    MAIN_K: tl.constexpr,
    REST_K: tl.constexpr,
    PER_STREAM: tl.constexpr,
    HAS_READ: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    NEED_STREAMS: tl.constexpr,
    NEED_PHI: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token_range = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    # A program's streams are `first_stream` and the next ones, the last one's fewer than GROUP.
    first_stream = 0 if GROUP == N else tl.program_id(2) * GROUP
    raw_rows: tl.constexpr = N if PER_STREAM else 1
    parts: tl.constexpr = 2 if REST_K else 1  # of the coefficients, see `padded_parts`

    weights = ()
    phi_sums = ()
    for j in tl.static_range(1 if PER_STREAM else GROUP):
        i = first_stream + j
        for part in tl.static_range(parts):
            k = part * MAIN_K + tl.arange(0, REST_K if part else MAIN_K)
            if NEED_STREAMS:
                row = phi + (i * C + c)[:, None] * K + k[None, :]
                in_phi = in_c[:, None] & (k < K)[None, :]
                if N % GROUP:
                    in_phi = in_phi & (i + tl.zeros_like(k) < N)[None, :]
                weights = weights + (tl.load(row, mask=in_phi, other=0.0),)
            phi_sums = phi_sums + (tl.zeros((BLOCK_C, k.shape[0]), tl.float32),)

    first = token_range * tokens_per_range
    last = tl.minimum(first + tokens_per_range, tokens)
    for start in tl.range(first, last, BLOCK_TOKENS):
        t = start + tl.arange(0, BLOCK_TOKENS)
        in_t = t < last
        in_token = in_t[:, None] & in_c[None, :]
        t = t.to(tl.int64)
        if HAS_READ:
            outer = tl.load(
                read_grad
                + t[:, None] * read_stride_token
                + (c.to(tl.int64) * read_stride_channel)[None, :],
                mask=in_token,
                other=0.0,
            ).to(tl.float32)
        sums = ()
        for j in tl.static_range(GROUP):
            i = first_stream + j
            in_tile = in_token & (i + tl.zeros_like(c) < N)[None, :] if N % GROUP else in_token
            in_pre = in_t & (i + tl.zeros_like(t) < N) if N % GROUP else in_t
            row_of_raw = t * raw_rows + (i if PER_STREAM else 0)
            if PER_STREAM or j == 0:
                raw = ()
                for part in tl.static_range(parts):
                    k = part * MAIN_K + tl.arange(0, REST_K if part else MAIN_K)
                    columns = raw_grad + k[None, :].to(tl.int64) * (tokens * raw_rows)
                    in_raw = in_t[:, None] & (k < K)[None, :]
                    raw = raw + (tl.load(columns + row_of_raw[:, None], mask=in_raw, other=0.0),)
            x = tl.load(
                streams
                + t[:, None] * stride_token
                + tl.cast(i, tl.int64) * stride_stream
                + (c.to(tl.int64) * stride_channel)[None, :],
                mask=in_tile,
                other=0.0,
            ).to(tl.float32)
            if NEED_PHI:
                more = ()
                for part in tl.static_range(parts):
                    if PER_STREAM:
                        so_far = phi_sums[0] if j == 0 else sums[0]
                    else:
                        so_far = phi_sums[j * parts + part]
                    product = tl.dot(tl.trans(x), raw[part], so_far, input_precision=PRECISION)
                    more = more + (product,)
                sums = more if PER_STREAM else sums + more
            if NEED_STREAMS:
                norm = tl.load(scale + row_of_raw, mask=in_t, other=0.0)
                grad = norm[:, None] * x
                if HAS_READ:
                    grad += tl.load(pre + t * N + i, mask=in_pre, other=0.0)[:, None] * outer
                if HAS_KEPT:
                    grad += tl.load(
                        kept_grad
                        + t[:, None] * kept_stride_token
                        + tl.cast(i, tl.int64) * kept_stride_stream
                        + (c.to(tl.int64) * kept_stride_channel)[None, :],
                        mask=in_tile,
                        other=0.0,
                    ).to(tl.float32)
                for part in tl.static_range(parts):
                    phi_rows = tl.trans(weights[(0 if PER_STREAM else j) * parts + part])
                    grad += tl.dot(raw[part], phi_rows, input_precision=PRECISION)
                tl.store(
                    streams_grad + t[:, None] * (N * C) + i * C + c[None, :],
                    grad.to(streams_grad.dtype.element_ty),
                    mask=in_tile,
                )
        if NEED_PHI:
            phi_sums = sums

    if NEED_PHI:
        # By columns: the offsets of phi's rows would else be kept in registers until here.
        phi_rows_of_range: tl.constexpr = C if PER_STREAM else N * C
        partial = phi_grad + token_range.to(tl.int64) * (phi_rows_of_range * K)
        for j in tl.static_range(1 if PER_STREAM else GROUP):
            i = first_stream + j
            for part in tl.static_range(parts):
                k = part * MAIN_K + tl.arange(0, REST_K if part else MAIN_K)
                out = partial + (i * K + k)[:, None] * C + c[None, :]
                in_phi = (k < K)[:, None] & in_c[None, :]
                if N % GROUP:
                    in_phi = in_phi & (i + tl.zeros_like(k) < N)[:, None]
                tl.store(out, tl.trans(phi_sums[j * parts + part]), mask=in_phi)


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
    """How many streams' phi and gradient of phi fit the registers of a program.

    All of up to 4. For more, ``read_grad`` is read once per 4 streams, or per 2 of float32, whose
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
        phi: [n·C, K] float32 contiguous, or [C, K] with ``per_stream``.
        raw_grad: Gradient of the raw coefficients [K, T], or [K, T·n] with ``per_stream``.
        scale: What the norm adds per unit of x [T], or [T·n].
        pre: [T, n].
        read_grad: Gradient of the sub-layer's input [T, C], or None if there is none.
        kept_grad: Gradient that comes from the merge [T, n, C], or None.
        need_streams: Whether the streams' gradient is asked for.
        need_phi: Whether phi's is.
        per_stream: Whether each stream has coefficients of its own (HC).

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
    outer = streams if read_grad is None else read_grad
    kept = streams if kept_grad is None else kept_grad
    launch(
        _project_backward,
        (channel_blocks, ranges, triton.cdiv(n, group)),
        streams,
        phi,
        raw_grad,
        scale,
        pre,
        outer,
        kept,
        streams_grad,
        partials,
        tokens,
        per_range,
        *streams.stride(),
        outer.stride(0),
        outer.stride(-1),
        *kept.stride(),
        N=n,
        GROUP=group,
        C=width,
        K=coefficients,
        MAIN_K=main,
        REST_K=rest,
        PER_STREAM=per_stream,
        HAS_READ=read_grad is not None,
        HAS_KEPT=kept_grad is not None,
        NEED_STREAMS=need_streams,
        NEED_PHI=need_phi,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_C=config.block_width,
        PRECISION=product_precision(streams),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if partials is None:
        return streams_grad, None
    return streams_grad, partials.sum(0).mT.reshape(phi.shape).contiguous()
