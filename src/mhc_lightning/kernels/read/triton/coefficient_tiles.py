"""Tiles, sums and launches that the coefficients of mHC and of HC share.

A token's n² + 2n mappings come in three parts, 0: pre, 1: post, 2: residual. The kernels hold a
part of BT tokens (`block_tokens`) as a tile [BT, R, P]: P is n padded to a power of two (`padded`),
and R is P for the residual matrix, 1 for the gates.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.mappings import MappingGrads, StreamMappings
from mhc_lightning.kernels.triton_support.block_sizes import Config
from mhc_lightning.kernels.triton_support.launch import launch


def launch_forward(
    kernel: Any,
    config: Config,
    partials: tuple[Tensor, Tensor],
    alpha: Tensor,
    bias: Tensor,
    n: int,
    tokens: int,
    width: int,
    eps: float,
    **constants: Any,
) -> tuple[StreamMappings, Tensor, Tensor]:
    """Run a forward kernel.

    Args:
        kernel: The kernel.
        config: Its block sizes.
        partials: Partial products [S, K, rows] and partial sums of squares [S, rows]; a row is a
            token (mHC), or one stream of it (HC).
        alpha: Gates.
        bias: [n² + 2n].
        n: Number of streams.
        tokens: Number of tokens, T.
        width: Number of squares in the sum.
        eps: Added to the mean square.
        **constants: Further constants of the kernel.

    Returns:
        The mappings, the sums of the partial products [K, rows] and the inverse norms [rows].
    """
    splits, count, rows = partials[0].shape
    mappings = StreamMappings(
        bias.new_empty((tokens, n)), bias.new_empty((tokens, n)), bias.new_empty((tokens, n, n))
    )
    raw, inverse_rms = bias.new_empty((count, rows)), bias.new_empty((rows,))
    launch(
        kernel,
        (triton.cdiv(tokens, config.block_tokens),),
        *partials,
        alpha,
        bias,
        *mappings,
        raw,
        inverse_rms,
        tokens,
        splits,
        width,
        eps,
        n=n,
        padded=triton.next_power_of_2(n),
        block_tokens=config.block_tokens,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **constants,
    )
    return mappings, raw, inverse_rms


def launch_backward(
    kernel: Any,
    config: Config,
    grads: MappingGrads,
    raw: Tensor,
    inverse_rms: Tensor,
    parameters: tuple[Tensor, ...],
    n: int,
    tokens: int,
    width: int,
    **constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a backward kernel.

    Args:
        kernel: The kernel.
        config: Its block sizes.
        grads: Gradients of the mappings; None stands for zeros.
        raw: [K, rows] from the forward pass.
        inverse_rms: [rows] from the forward pass.
        parameters: Those that the kernel reads.
        n: Number of streams.
        tokens: Number of tokens, T.
        width: Number of squares in the sum.
        **constants: Further constants of the kernel.

    Returns:
        Gradient of `raw`; scale [rows], where the norm adds `scale · x` to the streams' gradient;
        gradients of the parts' gates [3] and of the biases [n² + 2n].
    """
    programs = triton.cdiv(tokens, config.block_tokens)
    raw_grad, scale = raw.new_empty(raw.shape), inverse_rms.new_empty(inverse_rms.shape)
    partials = raw.new_empty((3 + n * n + 2 * n, programs))
    shapes = ((tokens, n), (tokens, n), (tokens, n, n))
    launch(
        kernel,
        (programs,),
        *(
            raw.new_zeros(shape) if grad is None else grad.contiguous()
            for grad, shape in zip(grads, shapes, strict=True)
        ),
        raw,
        inverse_rms,
        *parameters,
        raw_grad,
        scale,
        partials,
        tokens,
        width,
        n=n,
        padded=triton.next_power_of_2(n),
        block_tokens=config.block_tokens,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **constants,
    )
    return raw_grad, scale, partials[:3].sum(1), partials[3:].sum(1)


@triton.jit
def entries(token, tokens, part: tl.constexpr, n: tl.constexpr, padded: tl.constexpr):
    """A part's entries: index in the part [1, R, P] and whether it exists; the same per token."""
    row = tl.arange(0, padded if part == 2 else 1)[None, :, None]
    column = tl.arange(0, padded)[None, None, :]
    k = row * n + column
    in_part = (row < n) & (column < n)
    size: tl.constexpr = n * n if part == 2 else n
    per_token = token.to(tl.int64)[:, None, None] * size + k
    return k, in_part, per_token, in_part & (token < tokens)[:, None, None]


@triton.jit
def sum_of_splits(ptr, offsets, exists, split_size, splits):
    """The sum over the first axis of partial results [S, …], at `offsets` in the others."""
    total = tl.zeros(exists.shape, tl.float32)
    for split in tl.range(splits):
        total += tl.load(ptr + split * split_size + offsets, mask=exists, other=0.0)
    return total


@triton.jit
def store_parameter_grads(
    partials_ptr, alpha_grad, grad, k, in_part, part: tl.constexpr, n: tl.constexpr
):
    """Store this program's share of the parameters' gradients in [3 + n² + 2n, programs].

    `alpha_grad` is the share of the part's gate, `grad` [BT, R, P] the gradient of its biases by
    token.
    """
    programs = tl.num_programs(0)
    share_ptr = partials_ptr + tl.program_id(0)
    biases = share_ptr + (3 + part * n + k) * programs
    tl.store(biases, tl.sum(grad, 0, keep_dims=True), mask=in_part)
    tl.store(share_ptr + part * programs, alpha_grad)
