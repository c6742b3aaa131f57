"""Context gates in one pass over streams and keys, and their gradients in another."""

import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.context_gate.operands import (
    LEAST_SCORE,
    GateGrads,
    GateOperands,
    GateResults,
)
from mhc_lightning.kernels.triton_support.block_sizes import Config, configured
from mhc_lightning.kernels.triton_support.launch import launch
from mhc_lightning.kernels.triton_support.tiles import (
    VECTOR_BYTES,
    WARP_BYTES,
    inside,
    load_streams,
    pointers,
    row_chunk,
    strides_in,
    vector_width,
)


def gate_forward(operands: GateOperands, eps: float) -> GateResults:
    """Gates and what backward needs; reads streams and keys once.

    Args:
        operands: Streams and keys of any strides, the weight contiguous and float32.
        eps: Added to the mean squares.
    """
    streams, key, weight = operands
    tokens, n, width = streams.shape
    default = gate_forward_config(n, width, streams.element_size())
    config = configured("context_gate_forward", n, width, streams.dtype, default)
    vector = vector_width(width, streams, key)
    results = GateResults(*(weight.new_empty(tokens, n) for _ in GateResults._fields))
    launch(
        context_gate_forward_kernel,
        (triton.cdiv(tokens, config.block_tokens),),
        streams,
        key,
        weight,
        *results,
        tokens,
        *strides_in(vector, streams),
        *strides_in(vector, key),
        eps=eps,
        least=LEAST_SCORE,
        n=n,
        width=width,
        vector=vector,
        block_tokens=config.block_tokens,
        lanes=config.block_width * streams.element_size() // VECTOR_BYTES,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return results


def gate_backward(
    operands: GateOperands,
    score: Tensor,
    inverse_rms: Tensor,
    key_inverse_rms: Tensor,
    kept_grad: Tensor | None,
    gate_grad: Tensor,
) -> GateGrads:
    """All gradients; each stream-sized tensor is read or written once.

    Args:
        operands: As in `gate_forward`.
        score: [T, n], from `gate_forward`, as the next two.
        inverse_rms: [T, n].
        key_inverse_rms: [T, n].
        kept_grad: A gradient [T, n, C] to add to that of the streams, any strides, or None.
        gate_grad: Gradient of the gates [T, n].
    """
    streams, key, weight = operands
    tokens, n, width = streams.shape
    default = gate_backward_config(n, width, streams.element_size())
    config = configured("context_gate_backward", n, width, streams.dtype, default)
    token_blocks = triton.cdiv(tokens, config.block_tokens)
    kept = streams if kept_grad is None else kept_grad
    vector = vector_width(width, streams, key, kept)
    grads = GateGrads(
        streams.new_empty(streams.shape),
        key.new_empty(key.shape),
        weight.new_empty(token_blocks, n, width),
    )
    launch(
        context_gate_backward_kernel,
        (token_blocks * triton.cdiv(width, config.block_width),),
        streams,
        key,
        weight,
        kept_grad,
        gate_grad.contiguous(),
        score,
        inverse_rms,
        key_inverse_rms,
        *grads,
        tokens,
        *strides_in(vector, streams),
        *strides_in(vector, key),
        *strides_in(vector, kept),
        least=LEAST_SCORE,
        n=n,
        width=width,
        vector=vector,
        block_tokens=config.block_tokens,
        block_width=config.block_width,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return grads._replace(weight=grads.weight.sum(0))


def gate_forward_config(n: int, width: int, itemsize: int) -> Config:
    """A warp per token: sums over C need no shared memory."""
    return Config(1, WARP_BYTES // itemsize, num_warps=1, num_stages=1)


def gate_backward_config(n: int, width: int, itemsize: int) -> Config:
    """As many tokens as leave the partial sums of the weight's gradient small beside the streams.

    A thread takes two vectors of each operand.
    """
    return Config(32, 8 * VECTOR_BYTES // itemsize, num_warps=4, num_stages=1)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "token_stride",
        "stream_stride",
        "key_token_stride",
        "key_stream_stride",
    ]
)
def context_gate_forward_kernel(
    streams_ptr,
    key_ptr,
    weight_ptr,
    gate_ptr,
    score_ptr,
    inverse_rms_ptr,
    key_inverse_rms_ptr,
    tokens,
    token_stride,  # in units of `vector`, as all strides but the last of a tensor
    stream_stride,
    width_stride,
    key_token_stride,
    key_stream_stride,
    key_width_stride,
    eps: tl.constexpr,
    least: tl.constexpr,
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
    products = ()
    squares = ()
    key_squares = ()
    for _ in tl.static_range(n):
        products = products + (tl.zeros((block_tokens, lanes), tl.float32),)
        squares = squares + (tl.zeros((block_tokens, lanes), tl.float32),)
        key_squares = key_squares + (tl.zeros((block_tokens, lanes), tl.float32),)
    for start in range(0, width, step):
        column = start + lane
        mask = inside(row, column, tokens, width, step)
        at = pointers(streams_ptr, row, column, token_stride, width_stride, vector)
        tiles = load_streams(at, stream_stride, mask, n, vector)
        at = pointers(key_ptr, row, column, key_token_stride, key_width_stride, vector)
        keys = load_streams(at, key_stream_stride, mask, n, vector)
        more_products = ()
        more_squares = ()
        more_key_squares = ()
        for j in tl.static_range(n):
            weight = tl.load(weight_ptr + j * width + column, mask=column < width, other=0.0)
            tile = tiles[j].to(tl.float32)
            key = keys[j].to(tl.float32)
            more_products = more_products + (products[j] + tl.sum(tile * weight * key, axis=2),)
            more_squares = more_squares + (squares[j] + tl.sum(tile * tile, axis=2),)
            more_key_squares = more_key_squares + (key_squares[j] + tl.sum(key * key, axis=2),)
        products = more_products
        squares = more_squares
        key_squares = more_key_squares
    in_tokens = token < tokens
    for j in tl.static_range(n):
        inverse_rms = tl.rsqrt(tl.sum(squares[j], axis=1) / width + eps)
        key_inverse_rms = tl.rsqrt(tl.sum(key_squares[j], axis=1) / width + eps)
        score = tl.sum(products[j], axis=1) * inverse_rms * key_inverse_rms * (1 / width**0.5)
        at = token * n + j
        tl.store(gate_ptr + at, _gate_of(score, least), mask=in_tokens)
        tl.store(score_ptr + at, score, mask=in_tokens)
        tl.store(inverse_rms_ptr + at, inverse_rms, mask=in_tokens)
        tl.store(key_inverse_rms_ptr + at, key_inverse_rms, mask=in_tokens)


@triton.jit
def _gate_of(score, least: tl.constexpr):
    """σ of the signed square root."""
    root = tl.sqrt(tl.maximum(tl.abs(score), least))
    signed = tl.where(score > 0, root, tl.where(score < 0, -root, 0.0))
    return tl.sigmoid(signed)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "token_stride",
        "stream_stride",
        "key_token_stride",
        "key_stream_stride",
        "kept_token_stride",
        "kept_stream_stride",
    ]
)
def context_gate_backward_kernel(
    streams_ptr,
    key_ptr,
    weight_ptr,
    kept_grad_ptr,  # None: there is none
    gate_grad_ptr,
    score_ptr,
    inverse_rms_ptr,
    key_inverse_rms_ptr,
    streams_grad_ptr,
    key_grad_ptr,
    weight_sums_ptr,
    tokens,
    token_stride,  # in units of `vector`, as all strides but the last of a tensor
    stream_stride,
    width_stride,
    key_token_stride,
    key_stream_stride,
    key_width_stride,
    kept_token_stride,
    kept_stream_stride,
    kept_width_stride,
    least: tl.constexpr,
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
    in_width = column < width
    block = token // block_tokens  # the same number for all tokens of the program
    from_streams = pointers(streams_ptr, row, column, token_stride, width_stride, vector)
    from_key = pointers(key_ptr, row, column, key_token_stride, key_width_stride, vector)
    for j in tl.static_range(n):
        at = token * n + j
        score = tl.load(score_ptr + at, mask=in_tokens, other=0.0)
        inverse_rms = tl.load(inverse_rms_ptr + at, mask=in_tokens, other=0.0)
        key_inverse_rms = tl.load(key_inverse_rms_ptr + at, mask=in_tokens, other=0.0)
        gate_grad = tl.load(gate_grad_ptr + at, mask=in_tokens, other=0.0)
        gate = _gate_of(score, least)
        size = tl.abs(score)
        slope = tl.where(size >= least, 0.5 * tl.rsqrt(tl.maximum(size, least)), 0.0)
        score_grad = gate_grad * gate * (1 - gate) * slope
        through_norm = -score_grad * score / width
        product = (score_grad * inverse_rms * key_inverse_rms * (1 / width**0.5))[:, None]
        own = (through_norm * inverse_rms * inverse_rms)[:, None]
        key_own = (through_norm * key_inverse_rms * key_inverse_rms)[:, None]
        weight = tl.load(weight_ptr + j * width + column, mask=in_width, other=0.0)
        offset = j * stream_stride.to(tl.int64) * vector
        tile = tl.load(from_streams + offset, mask=mask, other=0.0).to(tl.float32)
        offset = j * key_stream_stride.to(tl.int64) * vector
        key = tl.load(from_key + offset, mask=mask, other=0.0).to(tl.float32)
        streams_grad = product * weight * key + own * tile
        if kept_grad_ptr is not None:
            from_kept = pointers(
                kept_grad_ptr, row, column, kept_token_stride, kept_width_stride, vector
            )
            offset = j * kept_stream_stride.to(tl.int64) * vector
            streams_grad += tl.load(from_kept + offset, mask=mask, other=0.0).to(tl.float32)
        to = row * (n * width) + j * width + column
        kind = streams_grad_ptr.dtype.element_ty
        tl.store(streams_grad_ptr + to, streams_grad.to(kind), mask=mask)
        key_grad = product * weight * tile + key_own * key
        tl.store(key_grad_ptr + to, key_grad.to(key_grad_ptr.dtype.element_ty), mask=mask)
        sums = tl.sum(product * tile * key, axis=0)[None, :]
        to_sums = weight_sums_ptr + tl.min(block, axis=0) * (n * width) + j * width + column
        tl.store(to_sums, sums, mask=in_width)
