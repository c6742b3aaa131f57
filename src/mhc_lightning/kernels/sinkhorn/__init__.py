"""Projection onto the doubly stochastic matrices (arXiv 2512.24880, eq. 9)."""

from typing import Any

from torch import Tensor

from mhc_lightning.kernels.argument_checks import check_iterations
from mhc_lightning.kernels.backend import implementation
from mhc_lightning.kernels.precision import widened
from mhc_lightning.kernels.registration import operator
from mhc_lightning.kernels.sinkhorn import reference
from mhc_lightning.kernels.transforms import plain_gradients, transformable, transforming


def sinkhorn_knopp(logits: Tensor, num_iterations: int = 20) -> Tensor:
    """Map logits to (nearly) doubly stochastic matrices; eq. 9 of arXiv 2512.24880.

    The function exponentiates the logits, then divides by column sums and by row sums
    `num_iterations` times. Row sums are exact to rounding; the error of the truncation shows in the
    column sums. The gradient is that of the truncated iteration itself, not of its limit.

    Args:
        logits: [..., n, n] of any floating dtype and any size.
        num_iterations: Column-then-row normalisations, at least 1.

    Returns:
        Matrices [..., n, n], float64 for float64 logits and float32 otherwise.

    Raises:
        ValueError: If `logits` is not a batch of square matrices or `num_iterations` < 1.
    """
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits must be [..., n, n], not {list(logits.shape)}")
    check_iterations(num_iterations)
    n = logits.shape[-1]
    by_token = widened(logits).reshape(-1, n, n)
    run = transformable(sinkhorn_op, reference.sinkhorn_forward)
    matrices = run(by_token.permute(1, 2, 0).contiguous(), num_iterations)  # [n, n, T]
    return matrices.permute(2, 0, 1).reshape(logits.shape)


@operator("sinkhorn_knopp")
def sinkhorn_op(logits: Tensor, num_iterations: int) -> Tensor:
    """Sinkhorn-Knopp on contiguous logits [n, n, T], differentiable.

    One opaque operator: autograd keeps only the logits, and a compiler sees one node.
    """
    return implementation("sinkhorn", logits).sinkhorn_forward(logits, num_iterations)


@operator("sinkhorn_knopp_backward")
def sinkhorn_backward_op(grad: Tensor, logits: Tensor, num_iterations: int) -> Tensor:
    """Gradient [n, n, T] of the logits, given that of the matrices."""
    return implementation("sinkhorn", logits).sinkhorn_backward(grad, logits, num_iterations)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, *ctx.constants = inputs
    ctx.save_for_backward(logits)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if transforming():
        return plain_gradients(reference.sinkhorn_forward, ctx, 1, (grad,))
    (logits,) = ctx.saved_tensors
    return sinkhorn_backward_op(grad.contiguous(), logits, *ctx.constants), None


sinkhorn_op.register_autograd(_backward, setup_context=_setup_context)
