"""Backward of `merge_project`, after that of the coefficients.

    G[i] = new_grad[i] + pre[i] · read_grad + raw_grad · phi[i]ᵀ + scale · new[i]
    grad x[j] = Σ_i residual[i, j] · G[i]        grad y = Σ_i post[i] · G[i]
    grad residual[i, j] = G[i] · x[j]            grad post[i] = G[i] · y
    grad phi[i] = Σ_tokens new[i]ᵀ · raw_grad    (single pass: grad pre[i] = read_grad · new[i])

`new` is rebuilt from x and y. A program owns a block of channels of all streams and walks over a
range of tokens; sums over channels are completed outside, from one partial sum per block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.merge_read.triton.merge_project import stored_stream
from mhc_lightning.kernels.read.triton.project_backward import ranges_of_tokens
from mhc_lightning.kernels.triton_support.block_sizes import Config, configured
from mhc_lightning.kernels.triton_support.launch import launch
from mhc_lightning.kernels.triton_support.product_precision import product_precision
from mhc_lightning.kernels.triton_support.target import target_of
from mhc_lightning.kernels.triton_support.tiles import (
    load_stream_tile,
    load_stream_tiles,
    load_tile,
)


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
        scale: Factor of the new streams in the gradient that comes through the norm [T].
        pre: The weights [T, n] that the new streams were read with.
        read_grad: Gradient of the next input [T, C], or None.
        new_grad: Gradient of the new streams [T, n, C] that comes from later layers, or None.
        single_pass: True if `pre` was given, so that its gradient is a result.

    Returns:
        Gradients of streams, output, residual, post, phi, and of `pre` (None unless single pass).
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
    # Any pointer will do for an operand that is not there: the kernel does not touch it.
    read_operand = output if read_grad is None else read_grad
    new_operand = streams if new_grad is None else new_grad
    launch(
        merge_project_backward_kernel,
        (blocks, ranges),
        streams,
        output,
        residual.contiguous(),
        post.contiguous(),
        phi.contiguous(),
        raw_grad,
        scale,
        pre.contiguous(),
        read_operand,
        new_operand,
        streams_grad,
        output_grad,
        token_sums,
        partials,
        tokens,
        per_range,
        *streams.stride(),
        *output.stride(),
        *read_operand.stride(),
        *new_operand.stride(),
        n=n,
        width=width,
        count=coefficients,
        padded_count=max(16, triton.next_power_of_2(coefficients)),
        has_new=new_grad is not None,
        has_read=read_grad is not None,
        single_pass=single_pass,
        sums_per_token=sums,
        phi_on_chip=streams.element_size() == 2,
        block_tokens=config.block_tokens,
        block_width=config.block_width,
        stages=config.num_stages,
        precision=product_precision(streams),
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


@triton.jit(do_not_specialize=["tokens", "tokens_per_range"])
def merge_project_backward_kernel(
    streams_ptr,
    output_ptr,
    residual_ptr,
    post_ptr,
    phi_ptr,
    raw_grad_ptr,
    scale_ptr,
    pre_ptr,
    read_grad_ptr,
    new_grad_ptr,
    streams_grad_ptr,
    output_grad_ptr,
    token_sums_ptr,
    phi_grad_ptr,
    tokens,
    tokens_per_range,
    token_stride,
    stream_stride,
    width_stride,
    output_token_stride,
    output_width_stride,
    read_grad_token_stride,
    read_grad_width_stride,
    new_grad_token_stride,
    new_grad_stream_stride,
    new_grad_width_stride,
    n: tl.constexpr,
    width: tl.constexpr,
    count: tl.constexpr,
    padded_count: tl.constexpr,
    has_new: tl.constexpr,
    has_read: tl.constexpr,
    single_pass: tl.constexpr,
    sums_per_token: tl.constexpr,
    phi_on_chip: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
    stages: tl.constexpr,
    precision: tl.constexpr,
):
    block = tl.program_id(0)
    token_range = tl.program_id(1)
    channel = block * block_width + tl.arange(0, block_width)
    k = tl.arange(0, padded_count)
    in_channels = channel < width
    in_k = k < count
    in_phi = in_channels[:, None] & in_k[None, :]
    dtype: tl.constexpr = streams_grad_ptr.dtype.element_ty

    weights = ()
    phi_sums = ()
    for i in tl.static_range(n):
        if phi_on_chip:
            rows = phi_ptr + (i * width + channel)[:, None] * count + k[None, :]
            weights = weights + (tl.load(rows, mask=in_phi, other=0.0),)
        phi_sums = phi_sums + (tl.zeros((block_width, padded_count), tl.float32),)

    first = token_range * tokens_per_range
    last = tl.minimum(first + tokens_per_range, tokens)
    for start in tl.range(first, last, block_tokens, num_stages=stages):
        token = start + tl.arange(0, block_tokens)
        in_tokens = token < last
        in_tile = in_tokens[:, None] & in_channels[None, :]
        token = token.to(tl.int64)
        output = load_tile(
            output_ptr, token, channel, output_token_stride, output_width_stride, in_tile
        )
        tiles = load_stream_tiles(
            streams_ptr, token, channel, token_stride, stream_stride, width_stride, in_tile, n
        )
        raw = tl.load(
            raw_grad_ptr + k[None, :].to(tl.int64) * tokens + token[:, None],
            mask=in_tokens[:, None] & in_k[None, :],
            other=0.0,
        )
        norm = tl.load(scale_ptr + token, mask=in_tokens, other=0.0)
        if has_read:
            read_grad = load_tile(
                read_grad_ptr,
                token,
                channel,
                read_grad_token_stride,
                read_grad_width_stride,
                in_tile,
            )
        sums_of_block = token_sums_ptr + (block.to(tl.int64) * tokens + token) * sums_per_token
        to_output = tl.zeros((block_tokens, block_width), tl.float32)
        to_streams = ()
        for _ in tl.static_range(n):
            to_streams = to_streams + (tl.zeros((block_tokens, block_width), tl.float32),)
        sums = ()
        for i in tl.static_range(n):
            merged = stored_stream(
                i, tiles, output, residual_ptr, post_ptr, token, in_tokens, dtype
            )
            # The mask is for the compiler: it would else compute `merged` twice, once as laid out
            # for the product, instead of moving it there.
            merged = tl.where(in_tokens[:, None], merged, 0.0)
            product = tl.dot(tl.trans(merged), raw, phi_sums[i], input_precision=precision)
            sums = sums + (product,)
            # And the sum over one element lets what follows keep the layout of the loads: that of
            # a product would else be carried along, and every later sum be moved back by itself.
            if phi_on_chip:
                grad = tl.dot(weights[i], tl.trans(raw), input_precision=precision)
                grad = tl.trans(tl.sum(grad[:, :, None], 2))
            else:
                rows = phi_ptr + (i * width + channel)[:, None] * count + k[None, :]
                phi_rows = tl.trans(tl.load(rows, mask=in_phi, other=0.0))
                grad = tl.dot(raw, phi_rows, input_precision=precision)
                grad = tl.sum(grad[:, :, None], 2)
            grad += norm[:, None] * merged
            if has_read:
                weight = tl.load(pre_ptr + token * n + i, mask=in_tokens, other=0.0)
                grad += weight[:, None] * read_grad.to(tl.float32)
                if single_pass:
                    pre_grad = tl.sum(merged * read_grad.to(tl.float32), 1)
                    tl.store(sums_of_block + n * n + n + i, pre_grad, mask=in_tokens)
            if has_new:
                grad += load_stream_tile(
                    new_grad_ptr,
                    token,
                    i,
                    channel,
                    new_grad_token_stride,
                    new_grad_stream_stride,
                    new_grad_width_stride,
                    in_tile,
                ).to(tl.float32)
            to_output += (
                tl.load(post_ptr + token * n + i, mask=in_tokens, other=0.0)[:, None] * grad
            )
            tl.store(
                sums_of_block + n * n + i, tl.sum(grad * output.to(tl.float32), 1), mask=in_tokens
            )
            so_far = to_streams
            to_streams = ()
            for j in tl.static_range(n):
                weight = tl.load(
                    residual_ptr + token * (n * n) + i * n + j, mask=in_tokens, other=0.0
                )
                to_streams = to_streams + (so_far[j] + weight[:, None] * grad,)
                entry = tl.sum(grad * tiles[j].to(tl.float32), 1)
                tl.store(sums_of_block + i * n + j, entry, mask=in_tokens)
        phi_sums = sums
        to_output_grad = output_grad_ptr + token[:, None] * width + channel[None, :]
        tl.store(to_output_grad, to_output.to(output_grad_ptr.dtype.element_ty), mask=in_tile)
        for j in tl.static_range(n):
            target = streams_grad_ptr + token[:, None] * (n * width) + j * width + channel[None, :]
            tl.store(target, to_streams[j].to(dtype), mask=in_tile)

    # By columns: the offsets of phi's rows would else be kept in registers until here.
    partial = phi_grad_ptr + token_range.to(tl.int64) * (n * width * count)
    for i in tl.static_range(n):
        tl.store(
            partial + (i * count + k)[:, None] * width + channel[None, :],
            tl.trans(phi_sums[i]),
            mask=in_k[:, None] & in_channels[None, :],
        )
