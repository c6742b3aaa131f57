"""Sinkhorn-Knopp on chip and its exact gradient (arXiv 2512.24880, eq. 9).

A program holds the matrices of its BT tokens (`block_tokens`) as a tile [BT, P, P]. Rows and
columns are padded to P (`padded`), a power of two: `diag(M, 1)` stays doubly stochastic, so the
padding needs no guards. T is the number of all tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_lightning.kernels.triton_support.block_sizes import Config, configured
from mhc_lightning.kernels.triton_support.launch import launch


@triton.jit
def padded_logits(logits, n: tl.constexpr):
    """Logits [BT, P, P] of `diag(M, 1)`, from those of M in the first n rows and columns."""
    row = tl.arange(0, logits.shape[1])[None, :, None]
    column = tl.arange(0, logits.shape[2])[None, None, :]
    padding = tl.where(row == column, 0.0, float("-inf"))
    return tl.where((row < n) & (column < n), logits, padding)


@triton.jit
def first_iteration(logits):
    """The matrices after the first iteration, and what its rows were divided by.

    Columns are shifted by their maximum, then rows by theirs: every row and column then holds a
    number of ordinary size, whatever the logits, and the other iterations need no logarithms.
    """
    below = logits - tl.max(logits, 1, keep_dims=True)
    column_sums = tl.sum(tl.exp(below), 1, keep_dims=True)
    row_shift = tl.max(below, 2, keep_dims=True)
    matrix = tl.exp(below - row_shift) * (1.0 / column_sums)
    row_sums = tl.sum(matrix, 2, keep_dims=True)
    return matrix * (1.0 / row_sums), row_sums * tl.exp(row_shift)


@triton.jit
def iteration(matrix):
    """Divide by the column sums, then by the row sums; returns both sums as well."""
    column_sums = tl.sum(matrix, 1, keep_dims=True)
    matrix = matrix * (1.0 / column_sums)
    row_sums = tl.sum(matrix, 2, keep_dims=True)
    return matrix * (1.0 / row_sums), column_sums, row_sums


@triton.jit
def sinkhorn(logits, num_iterations: tl.constexpr):
    """Matrices [BT, P, P] of logits [BT, P, P]."""
    matrix, _ = first_iteration(logits)
    for _ in tl.range(num_iterations - 1):
        matrix, _, _ = iteration(matrix)
    return matrix


@triton.jit
def _through_iterations(grad, logits, before, count: tl.constexpr, last: tl.constexpr):
    """Walk the gradient back through `count` iterations that follow the first and `before` others.

    It is that of the matrices' logarithms, or with `last` that of the matrices themselves.
    """
    matrix, _ = first_iteration(logits)
    for _ in tl.range(before):
        matrix, _, _ = iteration(matrix)
    sums = ()
    for _ in tl.static_range(count):
        matrix, column_sums, row_sums = iteration(matrix)
        sums = sums + (column_sums, row_sums)
    log_grad = grad * matrix if last else grad
    for k in tl.static_range(count):
        log_grad -= matrix * tl.sum(log_grad, 2, keep_dims=True)
        matrix *= sums[2 * (count - k) - 1]
        log_grad -= matrix * tl.sum(log_grad, 1, keep_dims=True)
        matrix *= sums[2 * (count - k) - 2]
    return log_grad


@triton.jit
def sinkhorn_gradient(grad, logits, num_iterations: tl.constexpr, segment: tl.constexpr):
    """Gradient [BT, P, P] of the logits, given that of the matrices (zero in the padding).

    In logarithmic coordinates a normalisation is `y = x - logsumexp(x)`, so its gradient is
    `G - M · ΣG` along the same axis. The iterates are recomputed `segment` iterations at a time:
    forward from the logits keeping only the sums, then back by multiplying with them.
    """
    segments: tl.constexpr = (num_iterations - 1) // segment
    rest: tl.constexpr = (num_iterations - 1) % segment
    log_grad = _through_iterations(grad, logits, segments * segment, rest, True)
    for k in tl.range(segments):
        before = (segments - 1 - k) * segment
        log_grad = _through_iterations(log_grad, logits, before, segment, False)
    matrix, row_sums = first_iteration(logits)
    log_grad -= matrix * tl.sum(log_grad, 2, keep_dims=True)
    log_grad -= matrix * row_sums * tl.sum(log_grad, 1, keep_dims=True)
    return log_grad


@triton.jit(do_not_specialize=["tokens"])
def sinkhorn_forward_kernel(
    logits_ptr,
    matrices_ptr,
    tokens,
    n: tl.constexpr,
    padded: tl.constexpr,
    num_iterations: tl.constexpr,
    block_tokens: tl.constexpr,
):
    offsets, mask = _entries(tokens, n, padded, block_tokens)
    tile = padded_logits(tl.load(logits_ptr + offsets, mask=mask, other=0.0), n)
    tl.store(matrices_ptr + offsets, sinkhorn(tile, num_iterations), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def sinkhorn_backward_kernel(
    grad_ptr,
    logits_ptr,
    logit_grad_ptr,
    tokens,
    n: tl.constexpr,
    padded: tl.constexpr,
    num_iterations: tl.constexpr,
    segment: tl.constexpr,
    block_tokens: tl.constexpr,
):
    offsets, mask = _entries(tokens, n, padded, block_tokens)
    tile = padded_logits(tl.load(logits_ptr + offsets, mask=mask, other=0.0), n)
    result = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    result = sinkhorn_gradient(result, tile, num_iterations, segment)
    tl.store(logit_grad_ptr + offsets, result, mask=mask)


@triton.jit
def _entries(tokens, n: tl.constexpr, padded: tl.constexpr, block_tokens: tl.constexpr):
    """Offsets of this program's matrices in [n, n, T] as [BT, P, P], and which exist."""
    token = (tl.program_id(0) * block_tokens + tl.arange(0, block_tokens))[:, None, None]
    row = tl.arange(0, padded)[None, :, None]
    column = tl.arange(0, padded)[None, None, :]
    offsets = (row * n + column).to(tl.int64) * tokens + token
    return offsets, (token < tokens) & (row < n) & (column < n)


def matrices_config(n: int, backward: bool = False) -> Config:
    """Few enough entries of a matrix in each thread of a warp that nothing spills."""
    padded = triton.next_power_of_2(n)
    threads = max(1, padded // (2 if backward else 4))
    return Config(block_tokens=32 // threads, block_width=1, num_warps=1, num_stages=1)


def sinkhorn_segment(n: int, num_iterations: int) -> int:
    """Iterations whose sums the backward pass holds in registers, as evenly cut as can be."""
    most = 10 if n <= 4 else 5
    later = max(num_iterations - 1, 1)
    return triton.cdiv(later, triton.cdiv(later, most))


def sinkhorn_forward(logits: Tensor, num_iterations: int) -> Tensor:
    """Map logits [n, n, T] to (nearly) doubly stochastic matrices [n, n, T], both float32.

    Args:
        logits: Contiguous, of any size.
        num_iterations: Column-then-row normalisations, at least 1.
    """
    n, _, tokens = logits.shape
    config = configured("sinkhorn_forward", n, 1, torch.float32, matrices_config(n))
    matrices = torch.empty_like(logits)
    launch(
        sinkhorn_forward_kernel,
        (triton.cdiv(tokens, config.block_tokens),),
        logits,
        matrices,
        tokens,
        n=n,
        padded=triton.next_power_of_2(n),
        num_iterations=num_iterations,
        block_tokens=config.block_tokens,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return matrices


def sinkhorn_backward(grad: Tensor, logits: Tensor, num_iterations: int) -> Tensor:
    """Gradient [n, n, T] of the logits, given that of the matrices; see `sinkhorn_forward`."""
    n, _, tokens = logits.shape
    default = matrices_config(n, backward=True)
    config = configured("sinkhorn_backward", n, 1, torch.float32, default)
    logit_grad = torch.empty_like(logits)
    launch(
        sinkhorn_backward_kernel,
        (triton.cdiv(tokens, config.block_tokens),),
        grad,
        logits,
        logit_grad,
        tokens,
        n=n,
        padded=triton.next_power_of_2(n),
        num_iterations=num_iterations,
        segment=sinkhorn_segment(n, num_iterations),
        block_tokens=config.block_tokens,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return logit_grad
