"""From projected streams to the mappings of Hyper-Connections and back (arXiv 2409.19606).

Every stream has its own norm and its own n + 2 raw coefficients, so that a token's form a matrix
[n + 2, n]: its first two rows become pre and post, the others the residual matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.read.triton.coefficients import entries, given_or_zeros
from mhc_lightning.kernels.triton_support.block_sizes import Config, configured
from mhc_lightning.kernels.triton_support.launch import launch


@triton.jit
def _tanh(x):
    """Tanh and its slope, both to rounding: neither small x nor saturation costs digits."""
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 - square * (17 / 315)))
    decay = tl.exp(-2 * tl.abs(x))
    quotient = (1 - decay) / (1 + decay)
    value = tl.where(square < 0.04, series, tl.where(x < 0, -quotient, quotient))
    return value, 4 * decay / ((1 + decay) * (1 + decay))


@triton.jit
def _raw_entries(token, tokens, PART: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """Offsets of a part's raw coefficients in [N + 2, tokens · N] as [BT, R, P]."""
    row = tl.arange(0, P if PART == 2 else 1)[None, :, None]
    column = tl.arange(0, P)[None, None, :]
    return ((PART + row).to(tl.int64) * tokens + token[:, None, None]) * N + column


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
    TANH: tl.constexpr,
):
    k, in_part, per_token, exists = entries(token, tokens, PART, N, P)
    offsets = _raw_entries(token, tokens, PART, N, P)
    split_size = tokens.to(tl.int64) * ((N + 2) * N)
    product = tl.zeros(exists.shape, tl.float32)
    for split in tl.range(splits):
        product += tl.load(raw_partials + split * split_size + offsets, mask=exists, other=0.0)
    tl.store(raw + offsets, product, mask=exists)
    z = product * inverse_rms
    if TANH:
        z, _ = _tanh(z)
    static = tl.load(bias + PART * N + k, mask=in_part, other=0.0)
    tl.store(mapping + per_token, z * tl.load(alpha + PART % 2) + static, mask=exists)


@triton.jit(do_not_specialize=["tokens", "splits", "width"])
def _hyper_coefficients_forward(
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
    TANH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    _, _, stream, exists = entries(token, tokens, 0, N, P)
    squares = tl.zeros(exists.shape, tl.float32)
    for split in tl.range(splits):
        offsets = tokens.to(tl.int64) * N * split + stream
        squares += tl.load(square_partials + offsets, mask=exists, other=0.0)
    rms = tl.rsqrt(squares / width + eps)
    tl.store(inverse_rms + stream, rms, mask=exists)
    _forward_part(raw_partials, rms, alpha, bias, pre, raw, token, tokens, splits, 0, N, P, TANH)
    _forward_part(raw_partials, rms, alpha, bias, post, raw, token, tokens, splits, 1, N, P, TANH)
    _forward_part(
        raw_partials, rms, alpha, bias, residual, raw, token, tokens, splits, 2, N, P, TANH
    )


@triton.jit
def _backward_part(
    grad,
    raw,
    inverse_rms,
    alpha,
    raw_grad,
    partials,
    token,
    tokens,
    PART: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    TANH: tl.constexpr,
):
    """Write a part's gradients; returns what it adds to that of the inverse norms [BT, 1, P]."""
    k, in_part, per_token, exists = entries(token, tokens, PART, N, P)
    offsets = _raw_entries(token, tokens, PART, N, P)
    grad = tl.load(grad + per_token, mask=exists, other=0.0)
    product = tl.load(raw + offsets, mask=exists, other=0.0)
    z = product * inverse_rms
    slope = grad * tl.load(alpha + PART % 2)
    if TANH:
        z, derivative = _tanh(z)
        slope *= derivative
    tl.store(raw_grad + offsets, slope * inverse_rms, mask=exists)

    # This program's share of the parameters' gradients: [3 + n² + 2n, programs].
    programs = tl.num_programs(0)
    share = partials + tl.program_id(0)
    tl.store(share + (3 + PART * N + k) * programs, tl.sum(grad, 0, keep_dims=True), mask=in_part)
    tl.store(share + PART * programs, tl.sum(tl.sum(tl.sum(grad * z, 2), 1), 0))
    return tl.sum(slope * product, 1, keep_dims=True)


@triton.jit(do_not_specialize=["tokens", "width"])
def _hyper_coefficients_backward(
    pre_grad,
    post_grad,
    residual_grad,
    raw,
    inverse_rms,
    alpha,
    raw_grad,
    scale,
    partials,
    tokens,
    width,
    N: tl.constexpr,
    P: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    _, _, stream, exists = entries(token, tokens, 0, N, P)
    rms = tl.load(inverse_rms + stream, mask=exists, other=0.0)
    rms_grad = _backward_part(
        pre_grad, raw, rms, alpha, raw_grad, partials, token, tokens, 0, N, P, TANH
    )
    rms_grad += _backward_part(
        post_grad, raw, rms, alpha, raw_grad, partials, token, tokens, 1, N, P, TANH
    )
    rms_grad += _backward_part(
        residual_grad, raw, rms, alpha, raw_grad, partials, token, tokens, 2, N, P, TANH
    )
    tl.store(scale + stream, -rms * rms * rms * rms_grad / width, mask=exists)


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
        raw_partials: Partial products ``x[j] · phi`` [S, n + 2, T·n].
        square_partials: Partial sums of squares [S, T·n].
        alpha: [2], the scale of pre and residual, and that of post.
        bias: The static mappings [n² + 2n].
        n: Number of streams.
        width: How many squares were summed: C.
        tanh: Whether the dynamic part is bounded by tanh.
        eps: Added to the mean square.

    Returns:
        pre [T, n], post [T, n], residual [T, n, n], and for the backward pass the sums of the
        partial products [n + 2, T·n] and the inverse norms [T·n].
    """
    splits, rows, streams = raw_partials.shape
    tokens = streams // n
    default = hyper_coefficients_config(n)
    config = configured("hyper_coefficients_forward", n, width, torch.float32, default)
    pre, post = bias.new_empty((tokens, n)), bias.new_empty((tokens, n))
    residual = bias.new_empty((tokens, n, n))
    raw, inverse_rms = bias.new_empty((rows, streams)), bias.new_empty((streams,))
    launch(
        _hyper_coefficients_forward,
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
        TANH=tanh,
        BLOCK_TOKENS=config.block_tokens,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return pre, post, residual, raw, inverse_rms


def hyper_coefficients_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    raw: Tensor,
    inverse_rms: Tensor,
    alpha: Tensor,
    bias: Tensor,
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
        bias: [n² + 2n]; only its shape matters.
        n: Number of streams.
        width: C.
        tanh: As in the forward pass.

    Returns:
        Gradient of ``raw`` [n + 2, T·n]; scale [T·n], where the norm adds ``scale · x`` to a
        stream's gradient; gradients of alpha [2] and bias [n² + 2n].
    """
    tokens = inverse_rms.shape[0] // n
    default = hyper_coefficients_config(n)
    config = configured("hyper_coefficients_backward", n, width, torch.float32, default)
    programs = triton.cdiv(tokens, config.block_tokens)
    raw_grad, scale = torch.empty_like(raw), torch.empty_like(inverse_rms)
    partials = raw.new_empty((3 + len(bias), programs))
    launch(
        _hyper_coefficients_backward,
        (programs,),
        *given_or_zeros(grads, inverse_rms, tokens, n),
        raw,
        inverse_rms,
        alpha,
        raw_grad,
        scale,
        partials,
        tokens,
        width,
        N=n,
        P=triton.next_power_of_2(n),
        TANH=tanh,
        BLOCK_TOKENS=config.block_tokens,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    by_part = partials[:3].sum(1)
    alpha_grad = torch.stack([by_part[0] + by_part[2], by_part[1]])
    return raw_grad, scale, alpha_grad, partials[3:].sum(1)
