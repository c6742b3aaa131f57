"""From projected streams to mHC's mappings and back, on chip (arXiv 2512.24880, eqs. 15–19).

The n² + 2n coefficients of a token come in three parts, pre | post | residual, which the kernels
hold as tiles [tokens, rows, n]: one row of gates each, and the n rows of the residual matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.mappings import MappingGrads
from mhc_lightning.kernels.read.triton.coefficient_tiles import (
    entries,
    launch_backward,
    launch_forward,
    store_parameter_grads,
    sum_of_splits,
)
from mhc_lightning.kernels.sinkhorn.triton import (
    matrices_config,
    padded_logits,
    sinkhorn,
    sinkhorn_gradient,
    sinkhorn_segment,
)
from mhc_lightning.kernels.triton_support.block_sizes import configured


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
        raw_partials: Partial products `x · phi` [S, n² + 2n, T].
        square_partials: Partial sums of squares [S, T].
        alpha: [3].
        bias: [n² + 2n].
        n: Number of streams.
        width: Number of squares in the sum, n·C.
        num_iterations: Sinkhorn iterations, at least 1.
        eps: Added to the mean square.

    Returns:
        pre [T, n], post [T, n], residual [T, n, n], and for the backward pass the sums of the
        partial products [n² + 2n, T] and the inverse norms [T].
    """
    default = matrices_config(n)
    config = configured("coefficients_forward", n, width // n, torch.float32, default)
    mappings, raw, inverse_rms = launch_forward(
        coefficients_forward_kernel,
        config,
        (raw_partials, square_partials),
        *(alpha, bias, n, raw_partials.shape[2], width, eps),
        num_iterations=num_iterations,
    )
    return *mappings, raw, inverse_rms


def coefficients_backward(
    grads: MappingGrads,
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
        Gradient of `raw` [n² + 2n, T]; scale [T], where the norm adds `scale · x` to the
        streams' gradient; gradients of alpha [3] and bias [n² + 2n].
    """
    default = matrices_config(n, backward=True)
    config = configured("coefficients_backward", n, width // n, torch.float32, default)
    return launch_backward(
        coefficients_backward_kernel,
        config,
        *(grads, raw, inverse_rms, (alpha, bias), n, raw.shape[1], width),
        num_iterations=num_iterations,
        segment=sinkhorn_segment(n, num_iterations),
    )


@triton.jit
def _forward_part(
    raw_partials_ptr,
    inverse_rms,
    alpha_ptr,
    bias_ptr,
    mapping_ptr,
    raw_ptr,
    token,
    tokens,
    splits,
    part: tl.constexpr,
    n: tl.constexpr,
    padded: tl.constexpr,
    num_iterations: tl.constexpr,
):
    k, in_part, per_token, exists = entries(token, tokens, part, n, padded)
    shift = tl.load(bias_ptr + part * n + k, mask=in_part, other=0.0)
    offsets = (part * n + k).to(tl.int64) * tokens + token[:, None, None]
    split_size = tokens.to(tl.int64) * (n * n + 2 * n)
    product = sum_of_splits(raw_partials_ptr, offsets, exists, split_size, splits)
    tl.store(raw_ptr + offsets, product, mask=exists)
    logits = product * inverse_rms[:, None, None] * tl.load(alpha_ptr + part) + shift
    if part == 2:
        tl.store(
            mapping_ptr + per_token, sinkhorn(padded_logits(logits, n), num_iterations), mask=exists
        )
    else:
        tl.store(mapping_ptr + per_token, (1 + part) * tl.sigmoid(logits), mask=exists)


@triton.jit(do_not_specialize=["tokens", "splits", "width"])
def coefficients_forward_kernel(
    raw_partials_ptr,
    square_partials_ptr,
    alpha_ptr,
    bias_ptr,
    pre_ptr,
    post_ptr,
    residual_ptr,
    raw_ptr,
    inverse_rms_ptr,
    tokens,
    splits,
    width,
    eps,
    n: tl.constexpr,
    padded: tl.constexpr,
    num_iterations: tl.constexpr,
    block_tokens: tl.constexpr,
):
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    squares = sum_of_splits(square_partials_ptr, token, token < tokens, tokens.to(tl.int64), splits)
    rms = tl.rsqrt(squares / width + eps)
    tl.store(inverse_rms_ptr + token, rms, mask=token < tokens)
    mappings = (pre_ptr, post_ptr, residual_ptr)
    for part in tl.static_range(3):
        _forward_part(
            raw_partials_ptr,
            rms,
            alpha_ptr,
            bias_ptr,
            mappings[part],
            raw_ptr,
            token,
            tokens,
            splits,
            part,
            n,
            padded,
            num_iterations,
        )


@triton.jit
def _backward_part(
    grad_ptr,
    raw_ptr,
    inverse_rms,
    alpha_ptr,
    bias_ptr,
    raw_grad_ptr,
    partials_ptr,
    token,
    tokens,
    part: tl.constexpr,
    n: tl.constexpr,
    padded: tl.constexpr,
    num_iterations: tl.constexpr,
    segment: tl.constexpr,
):
    """Write a part's gradients; returns what it adds to that of the inverse norm [BT]."""
    k, in_part, per_token, exists = entries(token, tokens, part, n, padded)
    grad = tl.load(grad_ptr + per_token, mask=exists, other=0.0)
    shift = tl.load(bias_ptr + part * n + k, mask=in_part, other=0.0)
    offsets = (part * n + k).to(tl.int64) * tokens + token[:, None, None]
    # Loaded last: Triton lays the tile out as its last load does, and here tokens are contiguous,
    # so that a matrix lies in one thread or a few, and its sums cross few threads or none.
    product = tl.load(raw_ptr + offsets, mask=exists, other=0.0)
    logits = product * inverse_rms[:, None, None] * tl.load(alpha_ptr + part) + shift
    if part == 2:
        grad = sinkhorn_gradient(grad, padded_logits(logits, n), num_iterations, segment)
    else:
        grad = (1 + part) * grad * tl.sigmoid(logits) * tl.sigmoid(-logits)
    normed_grad = grad * tl.load(alpha_ptr + part)
    tl.store(raw_grad_ptr + offsets, normed_grad * inverse_rms[:, None, None], mask=exists)

    through_norm = tl.sum(tl.sum(grad * product, 2), 1)
    alpha_grad = tl.sum(through_norm * inverse_rms, 0)
    store_parameter_grads(partials_ptr, alpha_grad, grad, k, in_part, part, n)
    return through_norm * tl.load(alpha_ptr + part)


@triton.jit(do_not_specialize=["tokens", "width"])
def coefficients_backward_kernel(
    pre_grad_ptr,
    post_grad_ptr,
    residual_grad_ptr,
    raw_ptr,
    inverse_rms_ptr,
    alpha_ptr,
    bias_ptr,
    raw_grad_ptr,
    scale_ptr,
    partials_ptr,
    tokens,
    width,
    n: tl.constexpr,
    padded: tl.constexpr,
    num_iterations: tl.constexpr,
    segment: tl.constexpr,
    block_tokens: tl.constexpr,
):
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    rms = tl.load(inverse_rms_ptr + token, mask=token < tokens, other=0.0)
    grads = (pre_grad_ptr, post_grad_ptr, residual_grad_ptr)
    shares = ()
    for part in tl.static_range(3):
        share = _backward_part(
            grads[part],
            raw_ptr,
            rms,
            alpha_ptr,
            bias_ptr,
            raw_grad_ptr,
            partials_ptr,
            token,
            tokens,
            part,
            n,
            padded,
            num_iterations,
            segment,
        )
        shares = shares + (share,)
    rms_grad = shares[0] + shares[1] + shares[2]
    tl.store(scale_ptr + token, -rms * rms * rms * rms_grad / width, mask=token < tokens)
