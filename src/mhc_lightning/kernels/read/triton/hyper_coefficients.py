"""From projected streams to the mappings of Hyper-Connections and back (arXiv 2409.19606).

Every stream has its own norm and its own n + 2 raw coefficients, so that a token's form a matrix
[n + 2, n]: its first two rows become pre and post, the others the residual matrix.
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
from mhc_lightning.kernels.triton_support.block_sizes import Config, configured


def hyper_coefficients_config(n: int) -> Config:
    """Four entries of a residual matrix, padded to a power of two, in each thread."""
    return Config(
        block_tokens=512 // triton.next_power_of_2(n) ** 2,
        block_width=1,
        num_warps=4,
        num_stages=1,
    )


def hyper_coefficients_forward(
    raw_partials: Tensor,
    square_partials: Tensor,
    alpha: Tensor,
    bias: Tensor,
    n: int,
    width: int,
    tanh: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum the partial products of the streams and map them to coefficients.

    All tensors are float32 and contiguous.

    Args:
        raw_partials: Partial products `x[j] · phi` [S, n + 2, T·n].
        square_partials: Partial sums of squares [S, T·n].
        alpha: [2], the scale of pre and residual, and that of post.
        bias: The static mappings [n² + 2n].
        n: Number of streams.
        width: Number of squares in the sum, C.
        tanh: True if the dynamic part is bounded by tanh.
        eps: Added to the mean square.

    Returns:
        pre [T, n], post [T, n], residual [T, n, n], and for the backward pass the sums of the
        partial products [n + 2, T·n] and the inverse norms [T·n].
    """
    tokens = raw_partials.shape[2] // n
    default = hyper_coefficients_config(n)
    config = configured("hyper_coefficients_forward", n, width, torch.float32, default)
    mappings, raw, inverse_rms = launch_forward(
        hyper_coefficients_forward_kernel,
        config,
        (raw_partials, square_partials),
        *(alpha, bias, n, tokens, width, eps),
        tanh=tanh,
    )
    return *mappings, raw, inverse_rms


def hyper_coefficients_backward(
    grads: MappingGrads,
    raw: Tensor,
    inverse_rms: Tensor,
    alpha: Tensor,
    n: int,
    width: int,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk `hyper_coefficients_forward` back, given the gradients of pre, post and residual.

    Args:
        grads: [T, n], [T, n] and [T, n, n]; None stands for zeros.
        raw: [n + 2, T·n] from the forward pass.
        inverse_rms: [T·n] from the forward pass.
        alpha: [2].
        n: Number of streams.
        width: C.
        tanh: As in the forward pass.

    Returns:
        Gradient of `raw` [n + 2, T·n]; scale [T·n], where the norm adds `scale · x` to a
        stream's gradient; gradients of alpha [2] and bias [n² + 2n].
    """
    tokens = inverse_rms.shape[0] // n
    default = hyper_coefficients_config(n)
    config = configured("hyper_coefficients_backward", n, width, torch.float32, default)
    raw_grad, scale, by_part, bias_grad = launch_backward(
        hyper_coefficients_backward_kernel,
        config,
        *(grads, raw, inverse_rms, (alpha,), n, tokens, width),
        tanh=tanh,
    )
    alpha_grad = torch.stack([by_part[0] + by_part[2], by_part[1]])
    return raw_grad, scale, alpha_grad, bias_grad


@triton.jit
def _tanh(x):
    """Tanh and its slope, both exact to rounding for small, ordinary and large x."""
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 - square * (17 / 315)))
    decay = tl.exp(-2 * tl.abs(x))
    quotient = (1 - decay) / (1 + decay)
    value = tl.where(square < 0.04, series, tl.where(x < 0, -quotient, quotient))
    return value, 4 * decay / ((1 + decay) * (1 + decay))


@triton.jit
def _raw_entries(token, tokens, part: tl.constexpr, n: tl.constexpr, padded: tl.constexpr):
    """Offsets of a part's raw coefficients in [n + 2, T · n] as [BT, R, P]."""
    row = tl.arange(0, padded if part == 2 else 1)[None, :, None]
    column = tl.arange(0, padded)[None, None, :]
    return ((part + row).to(tl.int64) * tokens + token[:, None, None]) * n + column


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
    tanh: tl.constexpr,
):
    k, in_part, per_token, exists = entries(token, tokens, part, n, padded)
    offsets = _raw_entries(token, tokens, part, n, padded)
    split_size = tokens.to(tl.int64) * ((n + 2) * n)
    product = sum_of_splits(raw_partials_ptr, offsets, exists, split_size, splits)
    tl.store(raw_ptr + offsets, product, mask=exists)
    z = product * inverse_rms
    if tanh:
        z, _ = _tanh(z)
    static = tl.load(bias_ptr + part * n + k, mask=in_part, other=0.0)
    tl.store(mapping_ptr + per_token, z * tl.load(alpha_ptr + part % 2) + static, mask=exists)


@triton.jit(do_not_specialize=["tokens", "splits", "width"])
def hyper_coefficients_forward_kernel(
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
    tanh: tl.constexpr,
    block_tokens: tl.constexpr,
):
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    _, _, stream, exists = entries(token, tokens, 0, n, padded)
    squares = sum_of_splits(square_partials_ptr, stream, exists, tokens.to(tl.int64) * n, splits)
    rms = tl.rsqrt(squares / width + eps)
    tl.store(inverse_rms_ptr + stream, rms, mask=exists)
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
            tanh,
        )


@triton.jit
def _backward_part(
    grad_ptr,
    raw_ptr,
    inverse_rms,
    alpha_ptr,
    raw_grad_ptr,
    partials_ptr,
    token,
    tokens,
    part: tl.constexpr,
    n: tl.constexpr,
    padded: tl.constexpr,
    tanh: tl.constexpr,
):
    """Write a part's gradients; returns what it adds to that of the inverse norms [BT, 1, P]."""
    k, in_part, per_token, exists = entries(token, tokens, part, n, padded)
    offsets = _raw_entries(token, tokens, part, n, padded)
    grad = tl.load(grad_ptr + per_token, mask=exists, other=0.0)
    product = tl.load(raw_ptr + offsets, mask=exists, other=0.0)
    z = product * inverse_rms
    slope = grad * tl.load(alpha_ptr + part % 2)
    if tanh:
        z, derivative = _tanh(z)
        slope *= derivative
    tl.store(raw_grad_ptr + offsets, slope * inverse_rms, mask=exists)

    alpha_grad = tl.sum(tl.sum(tl.sum(grad * z, 2), 1), 0)
    store_parameter_grads(partials_ptr, alpha_grad, grad, k, in_part, part, n)
    return tl.sum(slope * product, 1, keep_dims=True)


@triton.jit(do_not_specialize=["tokens", "width"])
def hyper_coefficients_backward_kernel(
    pre_grad_ptr,
    post_grad_ptr,
    residual_grad_ptr,
    raw_ptr,
    inverse_rms_ptr,
    alpha_ptr,
    raw_grad_ptr,
    scale_ptr,
    partials_ptr,
    tokens,
    width,
    n: tl.constexpr,
    padded: tl.constexpr,
    tanh: tl.constexpr,
    block_tokens: tl.constexpr,
):
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    _, _, stream, exists = entries(token, tokens, 0, n, padded)
    rms = tl.load(inverse_rms_ptr + stream, mask=exists, other=0.0)
    grads = (pre_grad_ptr, post_grad_ptr, residual_grad_ptr)
    shares = ()
    for part in tl.static_range(3):
        share = _backward_part(
            grads[part],
            raw_ptr,
            rms,
            alpha_ptr,
            raw_grad_ptr,
            partials_ptr,
            token,
            tokens,
            part,
            n,
            padded,
            tanh,
        )
        shares = shares + (share,)
    rms_grad = shares[0] + shares[1] + shares[2]
    tl.store(scale_ptr + stream, -rms * rms * rms * rms_grad / width, mask=exists)
