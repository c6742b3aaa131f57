"""Backward across the seam (``merge_project.py``), but for what the coefficients need first.

    G[i] = new_grad[i] + pre[i] · read_grad + raw_grad · phi[i]ᵀ + scale · new[i]
    grad x[j] = Σ_i residual[i, j] · G[i]        grad y = Σ_i post[i] · G[i]
    grad residual[i, j] = G[i] · x[j]            grad post[i] = G[i] · y
    grad phi[i] = Σ_tokens new[i]ᵀ · raw_grad    (single pass: grad pre[i] = read_grad · new[i])

``new`` is rebuilt from x and y. A program owns a block of channels of all streams and walks over a
range of tokens; sums over channels are completed outside, from one partial sum per block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.merge_read.triton.merge_project import merged_stream
from mhc_lightning.kernels.read.triton.project_backward import ranges_of_tokens
from mhc_lightning.kernels.triton_support.block_sizes import Config, configured
from mhc_lightning.kernels.triton_support.launch import launch
from mhc_lightning.kernels.triton_support.product_precision import product_precision
from mhc_lightning.kernels.triton_support.target import target_of


@triton.jit(do_not_specialize=["tokens", "tokens_per_range"])
def _merge_project_backward(
    streams,
    output,
    residual,
    post,
    phi,
    raw_grad,
    scale,
    pre,
    read_grad,
    new_grad,
    streams_grad,
    output_grad,
    token_sums,
    phi_grad,
    tokens,
    tokens_per_range,
    stride_token,
    stride_stream,
    stride_channel,
    output_stride_token,
    output_stride_channel,
    read_stride_token,
    read_stride_channel,
    new_stride_token,
    new_stride_stream,
    new_stride_channel,
    N: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_READ: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    SUMS: tl.constexpr,
    PHI_ON_CHIP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    token_range = tl.program_id(1)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, PADDED_K)
    in_c = c < C
    in_k = k < K
    in_phi = in_c[:, None] & in_k[None, :]
    dtype: tl.constexpr = streams_grad.dtype.element_ty

    weights = ()
    phi_sums = ()
    for i in tl.static_range(N):
        if PHI_ON_CHIP:
            rows = phi + (i * C + c)[:, None] * K + k[None, :]
            weights = weights + (tl.load(rows, mask=in_phi, other=0.0),)
        phi_sums = phi_sums + (tl.zeros((BLOCK_C, PADDED_K), tl.float32),)

    first = token_range * tokens_per_range
    last = tl.minimum(first + tokens_per_range, tokens)
    for start in tl.range(first, last, BLOCK_TOKENS, num_stages=STAGES):
        t = start + tl.arange(0, BLOCK_TOKENS)
        in_t = t < last
        in_tile = in_t[:, None] & in_c[None, :]
        t = t.to(tl.int64)
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
        raw = tl.load(
            raw_grad + k[None, :].to(tl.int64) * tokens + t[:, None],
            mask=in_t[:, None] & in_k[None, :],
            other=0.0,
        )
        norm = tl.load(scale + t, mask=in_t, other=0.0)
        if HAS_READ:
            outer = tl.load(
                read_grad
                + t[:, None] * read_stride_token
                + (c.to(tl.int64) * read_stride_channel)[None, :],
                mask=in_tile,
                other=0.0,
            )
        sums_of_block = token_sums + (block.to(tl.int64) * tokens + t) * SUMS
        to_output = tl.zeros((BLOCK_TOKENS, BLOCK_C), tl.float32)
        to_streams = ()
        for _ in tl.static_range(N):
            to_streams = to_streams + (tl.zeros((BLOCK_TOKENS, BLOCK_C), tl.float32),)
        sums = ()
        for i in tl.static_range(N):
            merged = merged_stream(i, xs, y, residual, post, t, in_t, dtype)
            # The mask is for the compiler: it would else compute `merged` twice, once as laid out
            # for the product, instead of moving it there.
            merged = tl.where(in_t[:, None], merged, 0.0)
            product = tl.dot(tl.trans(merged), raw, phi_sums[i], input_precision=PRECISION)
            sums = sums + (product,)
            # And the sum over one element lets what follows keep the layout of the loads: that of
            # a product would else be carried along, and every later sum be moved back by itself.
            if PHI_ON_CHIP:
                grad = tl.dot(weights[i], tl.trans(raw), input_precision=PRECISION)
                grad = tl.trans(tl.sum(grad[:, :, None], 2))
            else:
                rows = phi + (i * C + c)[:, None] * K + k[None, :]
                phi_rows = tl.trans(tl.load(rows, mask=in_phi, other=0.0))
                grad = tl.dot(raw, phi_rows, input_precision=PRECISION)
                grad = tl.sum(grad[:, :, None], 2)
            grad += norm[:, None] * merged
            if HAS_READ:
                weight = tl.load(pre + t * N + i, mask=in_t, other=0.0)
                grad += weight[:, None] * outer.to(tl.float32)
                if SINGLE_PASS:
                    pre_grad = tl.sum(merged * outer.to(tl.float32), 1)
                    tl.store(sums_of_block + N * N + N + i, pre_grad, mask=in_t)
            if HAS_NEW:
                grad += tl.load(
                    new_grad
                    + t[:, None] * new_stride_token
                    + tl.cast(i, tl.int64) * new_stride_stream
                    + (c.to(tl.int64) * new_stride_channel)[None, :],
                    mask=in_tile,
                    other=0.0,
                ).to(tl.float32)
            to_output += tl.load(post + t * N + i, mask=in_t, other=0.0)[:, None] * grad
            tl.store(sums_of_block + N * N + i, tl.sum(grad * y.to(tl.float32), 1), mask=in_t)
            so_far = to_streams
            to_streams = ()
            for j in tl.static_range(N):
                weight = tl.load(residual + t * (N * N) + i * N + j, mask=in_t, other=0.0)
                to_streams = to_streams + (so_far[j] + weight[:, None] * grad,)
                entry = tl.sum(grad * xs[j].to(tl.float32), 1)
                tl.store(sums_of_block + i * N + j, entry, mask=in_t)
        phi_sums = sums
        target = output_grad + t[:, None] * C + c[None, :]
        tl.store(target, to_output.to(output_grad.dtype.element_ty), mask=in_tile)
        for j in tl.static_range(N):
            target = streams_grad + t[:, None] * (N * C) + j * C + c[None, :]
            tl.store(target, to_streams[j].to(dtype), mask=in_tile)

    # By columns: the offsets of phi's rows would else be kept in registers until here.
    partial = phi_grad + token_range.to(tl.int64) * (N * C * K)
    for i in tl.static_range(N):
        tl.store(
            partial + (i * K + k)[:, None] * C + c[None, :],
            tl.trans(phi_sums[i]),
            mask=in_k[:, None] & in_c[None, :],
        )


def merge_project_backward_config(
    n: int, width: int, itemsize: int, capability: int = 90
) -> Config:
    """As many channels as leave both sides of the seam and phi's gradient in registers.

    Wide blocks of channels make few partial sums of the tokens' coefficients: 128 channels' are
    2.1% of the streams at n = 4, 64 channels' 4.2%. A thread holds 16 bytes of each tile then, and
    the next tokens' tiles are fetched meanwhile. Before Hopper (before
    Blackwell, of float32) there is room for half as many channels, since products keep their
    operands in registers too; on Blackwell, fetching ahead would take too many.
    """
    wide = 256 // itemsize if capability >= (90 if itemsize == 2 else 100) else 128 // itemsize
    stages = 2 if itemsize == 2 and capability < 100 else 1
    return Config(block_tokens=16, block_width=wide, num_warps=8, num_stages=stages)


def merge_project_backward(
    streams: Tensor,
    output: Tensor,
    residual: Tensor,
    post: Tensor,
    phi: Tensor,
    raw_grad: Tensor,
    scale: Tensor,
    pre: Tensor,
    read_grad: Tensor | None,
    new_grad: Tensor | None,
    single_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of what was merged, of its mappings and of the next connection's phi.

    Args:
        streams: [T, n, C], any strides.
        output: [T, C], any strides.
        residual: [T, n, n] float32.
        post: [T, n] float32.
        phi: [n·C, K] float32.
        raw_grad: Gradient of the raw coefficients [K, T].
        scale: What the norm adds per unit of the new streams [T].
        pre: The weights [T, n] that the new streams were read with.
        read_grad: Gradient of the next input [T, C], or None.
        new_grad: Gradient of the new streams [T, n, C] from behind, or None.
        single_pass: Whether ``pre`` was given, so that its gradient is a result.

    Returns:
        Gradients of streams, output, residual, post, phi, and of ``pre`` (None unless single pass).
    """
    tokens, n, width = streams.shape
    coefficients = phi.shape[1]
    name = "merge_project_backward" + ("_single_pass" if single_pass else "")
    default = merge_project_backward_config(
        n, width, streams.element_size(), target_of(streams).capability
    )
    config = configured(name, n, width, streams.dtype, default)
    blocks = triton.cdiv(width, config.block_width)
    # Coefficients are a larger share of narrow streams: fewer partial sums fit in beside them.
    least = 1024 if width >= 1024 else 2048
    ranges, per_range = ranges_of_tokens(tokens, blocks, config.block_tokens, least)
    streams_grad = torch.empty_like(streams, memory_format=torch.contiguous_format)
    output_grad = torch.empty_like(output, memory_format=torch.contiguous_format)
    sums = n * n + (2 * n if single_pass and read_grad is not None else n)
    token_sums = streams.new_empty((blocks, tokens, sums), dtype=torch.float32)
    partials = streams.new_empty((ranges, n, coefficients, width), dtype=torch.float32)
    outer = output if read_grad is None else read_grad
    behind = streams if new_grad is None else new_grad
    launch(
        _merge_project_backward,
        (blocks, ranges),
        streams,
        output,
        residual.contiguous(),
        post.contiguous(),
        phi.contiguous(),
        raw_grad,
        scale,
        pre.contiguous(),
        outer,
        behind,
        streams_grad,
        output_grad,
        token_sums,
        partials,
        tokens,
        per_range,
        *streams.stride(),
        *output.stride(),
        *outer.stride(),
        *behind.stride(),
        N=n,
        C=width,
        K=coefficients,
        PADDED_K=max(16, triton.next_power_of_2(coefficients)),
        HAS_NEW=new_grad is not None,
        HAS_READ=read_grad is not None,
        SINGLE_PASS=single_pass,
        SUMS=sums,
        PHI_ON_CHIP=streams.element_size() == 2,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_C=config.block_width,
        STAGES=config.num_stages,
        PRECISION=product_precision(streams),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    has_pre = sums > n * n + n
    return (
        streams_grad,
        output_grad,
        token_sums[..., : n * n].sum(0).view(tokens, n, n),
        token_sums[..., n * n : n * n + n].sum(0),
        partials.sum(0).mT.reshape(phi.shape).contiguous(),
        token_sums[..., n * n + n :].sum(0) if has_pre else None,
    )
