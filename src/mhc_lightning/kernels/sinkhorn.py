"""Sinkhorn-Knopp projection onto the doubly stochastic matrices, with its exact gradient.

Equation 9 of arXiv 2512.24880: exponentiate, then divide by column sums, then by row sums,
``num_iterations`` times. The first iteration works on logarithms, so that logits of any size
neither overflow nor leave an empty row; after it every row and column holds an entry of at least
1/n², and the others work on the matrix itself.

Inside this file matrices are stored [n, n, tokens]: the sums then run over whole vectors of tokens.
"""

import torch
from torch import Tensor


def sinkhorn_knopp(logits: Tensor, num_iterations: int = 20) -> Tensor:
    """Map logits to (nearly) doubly stochastic matrices; eq. 9 of arXiv 2512.24880.

    Row sums are exact to rounding; what is left of the truncation shows in the column sums.
    The gradient is that of the truncated iteration itself, not of its limit.

    Args:
        logits: [..., n, n] of any floating dtype and any size.
        num_iterations: Column-then-row normalisations, at least 1.

    Returns:
        Matrices [..., n, n], float64 for float64 logits and float32 otherwise.

    Raises:
        ValueError: If ``logits`` is not a batch of square matrices or ``num_iterations`` < 1.
    """
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits must be [..., n, n], not {list(logits.shape)}")
    check_iterations(num_iterations)
    n = logits.shape[-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    by_token = logits.to(dtype).reshape(-1, n, n)
    matrices = sinkhorn_tokens_last(by_token.permute(1, 2, 0).contiguous(), num_iterations)
    return matrices.permute(2, 0, 1).reshape(logits.shape)


def check_iterations(num_iterations: int) -> None:
    """Raise ValueError unless ``num_iterations`` is at least 1."""
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, not {num_iterations}")


@torch.library.custom_op("mhc_lightning::sinkhorn_knopp", mutates_args=())
def sinkhorn_tokens_last(logits: Tensor, num_iterations: int) -> Tensor:
    """Sinkhorn-Knopp on contiguous logits [n, n, tokens], differentiable.

    One opaque operator: autograd keeps only the logits, and a compiler sees one node.
    """
    matrix = _first_iteration(logits)[1]
    sums = torch.empty_like(matrix[:1])
    for _ in range(num_iterations - 1):
        torch.sum(matrix, 0, keepdim=True, out=sums)
        matrix.div_(sums)
        matrix.div_(matrix.sum(1, keepdim=True))
    return matrix


@torch.library.custom_op("mhc_lightning::sinkhorn_knopp_backward", mutates_args=())
def sinkhorn_backward_tokens_last(grad: Tensor, logits: Tensor, num_iterations: int) -> Tensor:
    """Gradient [n, n, tokens] of the logits, given that of the matrices.

    Recomputes every iterate and walks all of them back. In logarithmic coordinates a normalisation
    is ``y = x - logsumexp(x)``, so its gradient is ``G - M · ΣG`` along the same axis.
    """
    iterates = logits.new_empty((2 * num_iterations, *logits.shape))
    iterates[0], iterates[1] = _first_iteration(logits)
    for k in range(2, 2 * num_iterations):
        previous = iterates[k - 1]
        torch.div(previous, previous.sum(k % 2, keepdim=True), out=iterates[k])
    log_grad = grad * iterates[-1]
    for k in reversed(range(2 * num_iterations)):
        log_grad.addcmul_(iterates[k], log_grad.sum(k % 2, keepdim=True), value=-1)
    return log_grad


def _first_iteration(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices after the first column and after the first row normalisation."""
    columns = logits - logits.logsumexp(0, keepdim=True)
    return columns.exp(), columns.softmax(1)


@sinkhorn_tokens_last.register_fake
def _(logits: Tensor, num_iterations: int) -> Tensor:
    return torch.empty_like(logits)


@sinkhorn_backward_tokens_last.register_fake
def _(grad: Tensor, logits: Tensor, num_iterations: int) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    logits, ctx.num_iterations = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(logits)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
    (logits,) = ctx.saved_tensors  # type: ignore[attr-defined]
    iterations = ctx.num_iterations  # type: ignore[attr-defined]
    return sinkhorn_backward_tokens_last(grad.contiguous(), logits, iterations), None


sinkhorn_tokens_last.register_autograd(_backward, setup_context=_setup_context)
