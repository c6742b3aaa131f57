"""From projected streams to mHC's mappings and back, on chip (arXiv 2512.24880, eqs. 15–19).

The n² + 2n coefficients of a token come in three parts, pre | post | residual, which the kernels
hold as tiles [tokens, rows, n]: one row of gates each, and the n rows of the residual matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.sinkhorn.triton import (
    matrices_config,
    padded_logits,
    sinkhorn,
    sinkhorn_gradient,
    sinkhorn_segment,
)
from mhc_lightning.kernels.triton_support.block_sizes import configured
from mhc_lightning.kernels.triton_support.launch import launch


@triton.jit
def entries(token, tokens, PART: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """A part's entries: index in the part [1, R, P] and whether it exists; the same per token."""
    row = tl.arange(0, P if PART == 2 else 1)[None, :, None]
    column = tl.arange(0, P)[None, None, :]
    k = row * N + column
    in_part = (row < N) & (column < N)
    size: tl.constexpr = N * N if PART == 2 else N
    per_token = token.to(tl.int64)[:, None, None] * size + k
    return k, in_part, per_token, in_part & (token < tokens)[:, None, None]


@triton.jit
def _forward_part(
    raw_partials,
    inverse_rms,
    alpha,
    bias,
    mapping,
    raw,
    token,
    tokens,
    splits,
    PART: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    k, in_part, per_token, exists = entries(token, tokens, PART, N, P)
    shift = tl.load(bias + PART * N + k, mask=in_part, other=0.0)
    offsets = (PART * N + k).to(tl.int64) * tokens + token[:, None, None]
    split_size = tokens.to(tl.int64) * (N * N + 2 * N)
    product = tl.zeros(exists.shape, tl.float32)
    for split in tl.range(splits):
        product += tl.load(raw_partials + split * split_size + offsets, mask=exists, other=0.0)
    tl.store(raw + offsets, product, mask=exists)
    logits = product * inverse_rms[:, None, None] * tl.load(alpha + PART) + shift
    if PART == 2:
        tl.store(mapping + per_token, sinkhorn(padded_logits(logits, N), ITERATIONS), mask=exists)
    else:
        tl.store(mapping + per_token, (1 + PART) * tl.sigmoid(logits), mask=exists)


@triton.jit(do_not_specialize=["tokens", "splits", "width"])
def _coefficients_forward(
    raw_partials,
    square_partials,
    alpha,
    bias,
    pre,
    post,
    residual,
    raw,
    inverse_rms,
    tokens,
    splits,
    width,
    eps,
    N: tl.constexpr,
    P: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    squares = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for split in tl.range(splits):
        offsets = tokens.to(tl.int64) * split + token
        squares += tl.load(square_partials + offsets, mask=token < tokens, other=0.0)
    rms = tl.rsqrt(squares / width + eps)
    tl.store(inverse_rms + token, rms, mask=token < tokens)
    _forward_part(
        raw_partials, rms, alpha, bias, pre, raw, token, tokens, splits, 0, N, P, ITERATIONS
    )
    _forward_part(
        raw_partials, rms, alpha, bias, post, raw, token, tokens, splits, 1, N, P, ITERATIONS
    )
    _forward_part(
        raw_partials, rms, alpha, bias, residual, raw, token, tokens, splits, 2, N, P, ITERATIONS
    )


@triton.jit
def _backward_part(
    grad,
    raw,
    inverse_rms,
    alpha,
    bias,
    raw_grad,
    partials,
    token,
    tokens,
    PART: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Write a part's gradients; returns what it adds to that of the inverse norm [BT]."""
    k, in_part, per_token, exists = entries(token, tokens, PART, N, P)
    grad = tl.load(grad + per_token, mask=exists, other=0.0)
    shift = tl.load(bias + PART * N + k, mask=in_part, other=0.0)
    offsets = (PART * N + k).to(tl.int64) * tokens + token[:, None, None]
    # Loaded last: Triton lays the tile out as its last load does, and here tokens are contiguous,
    # so that a matrix lies in one thread or a few, and its sums cross few threads or none.
    product = tl.load(raw + offsets, mask=exists, other=0.0)
    logits = product * inverse_rms[:, None, None] * tl.load(alpha + PART) + shift
    if PART == 2:
        grad = sinkhorn_gradient(grad, padded_logits(logits, N), ITERATIONS, SEGMENT)
    else:
        grad = (1 + PART) * grad * tl.sigmoid(logits) * tl.sigmoid(-logits)
    normed_grad = grad * tl.load(alpha + PART)
    tl.store(raw_grad + offsets, normed_grad * inverse_rms[:, None, None], mask=exists)

    # This program's share of the parameters' gradients: [3 + n² + 2n, programs].
    programs = tl.num_programs(0)
    share = partials + tl.program_id(0)
    tl.store(share + (3 + PART * N + k) * programs, tl.sum(grad, 0, keep_dims=True), mask=in_part)
    through_norm = grad * product
    through_norm = tl.sum(tl.sum(through_norm, 2), 1)
    tl.store(share + PART * programs, tl.sum(through_norm * inverse_rms, 0))
    return through_norm * tl.load(alpha + PART)


@triton.jit(do_not_specialize=["tokens", "width"])
def _coefficients_backward(
    pre_grad,
    post_grad,
    residual_grad,
    raw,
    inverse_rms,
    alpha,
    bias,
    raw_grad,
    scale,
    partials,
    tokens,
    width,
    N: tl.constexpr,
    P: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rms = tl.load(inverse_rms + token, mask=token < tokens, other=0.0)
    rms_grad = _backward_part(
        pre_grad, raw, rms, alpha, bias, raw_grad, partials, token, tokens,
        0, N, P, ITERATIONS, SEGMENT,
    )  # fmt: skip
    rms_grad += _backward_part(
        post_grad, raw, rms, alpha, bias, raw_grad, partials, token, tokens,
        1, N, P, ITERATIONS, SEGMENT,
    )  # fmt: skip
    rms_grad += _backward_part(
        residual_grad, raw, rms, alpha, bias, raw_grad, partials, token, tokens,
        2, N, P, ITERATIONS, SEGMENT,
    )  # fmt: skip
    tl.store(scale + token, -rms * rms * rms * rms_grad / width, mask=token < tokens)


def coefficients_forward(
    raw_partials: Tensor,
    square_partials: Tensor,
    alpha: Tensor,
    bias: Tensor,
    n: int,
    width: int,
    num_iterations: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum the projection's partial products and map them to coefficients (eqs. 15–19).

    All tensors are float32 and contiguous.

    Args:
        raw_partials: Partial products ``x · phi`` [S, n² + 2n, T].
        square_partials: Partial sums of squares [S, T].
        alpha: [3].
        bias: [n² + 2n].
        n: Number of streams.
        width: How many squares were summed: n·C.
        num_iterations: Sinkhorn iterations, at least 1.
        eps: Added to the mean square.

    Returns:
        pre [T, n], post [T, n], residual [T, n, n], and for the backward pass the sums of the
        partial products [n² + 2n, T] and the inverse norms [T].
    """
    splits, coefficients, tokens = raw_partials.shape
    default = matrices_config(n)
    config = configured("coefficients_forward", n, width // n, torch.float32, default)
    pre, post = bias.new_empty((tokens, n)), bias.new_empty((tokens, n))
    residual = bias.new_empty((tokens, n, n))
    raw, inverse_rms = bias.new_empty((coefficients, tokens)), bias.new_empty((tokens,))
    launch(
        _coefficients_forward,
        (triton.cdiv(tokens, config.block_tokens),),
        raw_partials,
        square_partials,
        alpha,
        bias,
        pre,
        post,
        residual,
        raw,
        inverse_rms,
        tokens,
        splits,
        width,
        eps,
        N=n,
        P=triton.next_power_of_2(n),
        ITERATIONS=num_iterations,
        BLOCK_TOKENS=config.block_tokens,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return pre, post, residual, raw, inverse_rms


def given_or_zeros(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None], like: Tensor, tokens: int, n: int
) -> list[Tensor]:
    """Contiguous gradients of pre, post and residual; zeros for those that are None."""
    shapes = ((tokens, n), (tokens, n), (tokens, n, n))
    return [
        like.new_zeros(shape) if grad is None else grad.contiguous()
        for grad, shape in zip(grads, shapes, strict=True)
    ]


def coefficients_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    raw: Tensor,
    inverse_rms: Tensor,
    alpha: Tensor,
    bias: Tensor,
    n: int,
    width: int,
    num_iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk `coefficients_forward` back, given the gradients of pre, post and residual.

    Args:
        grads: [T, n], [T, n] and [T, n, n]; None stands for zeros.
        raw: [n² + 2n, T] from the forward pass.
        inverse_rms: [T] from the forward pass.
        alpha: [3].
        bias: [n² + 2n].
        n: Number of streams.
        width: n·C.
        num_iterations: Sinkhorn iterations of the forward pass.

    Returns:
        Gradient of ``raw`` [n² + 2n, T]; scale [T], where the norm adds ``scale · x`` to the
        streams' gradient; gradients of alpha [3] and bias [n² + 2n].
    """
    coefficients, tokens = raw.shape
    default = matrices_config(n, backward=True)
    config = configured("coefficients_backward", n, width // n, torch.float32, default)
    programs = triton.cdiv(tokens, config.block_tokens)
    raw_grad, scale = torch.empty_like(raw), torch.empty_like(inverse_rms)
    partials = raw.new_empty((3 + coefficients, programs))
    launch(
        _coefficients_backward,
        (programs,),
        *given_or_zeros(grads, inverse_rms, tokens, n),
        raw,
        inverse_rms,
        alpha,
        bias,
        raw_grad,
        scale,
        partials,
        tokens,
        width,
        N=n,
        P=triton.next_power_of_2(n),
        ITERATIONS=num_iterations,
        SEGMENT=sinkhorn_segment(n, num_iterations),
        BLOCK_TOKENS=config.block_tokens,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return raw_grad, scale, partials[:3].sum(1), partials[3:].sum(1)
