"""Sinkhorn-Knopp (arXiv 2512.24880, eq. 9) on matrices [n, n, tokens], and its exact gradient.

The first iteration works on logarithms, so that logits of any size neither overflow nor leave an
empty row. After it every row and column holds an entry of at least 1/n², so the later iterations
work on the matrix itself. With the tokens last, the sums run over whole vectors of tokens.
"""

import torch
from torch import Tensor

from mhc_lightning.kernels.transforms import transforming


def sinkhorn_forward(logits: Tensor, num_iterations: int) -> Tensor:
    """Matrices [n, n, tokens] for contiguous logits [n, n, tokens]."""
    matrix = _first_iteration(logits)[1]
    if transforming():  # then every iterate is needed
        for k in range(2, 2 * num_iterations):
            matrix = matrix / matrix.sum(k % 2, keepdim=True)
        return matrix
    sums = torch.empty_like(matrix[:1])
    for _ in range(num_iterations - 1):
        torch.sum(matrix, 0, keepdim=True, out=sums)
        matrix.div_(sums)
        matrix.div_(matrix.sum(1, keepdim=True))
    return matrix


def sinkhorn_backward(grad: Tensor, logits: Tensor, num_iterations: int) -> Tensor:
    """Gradient [n, n, tokens] of the logits, given that of the matrices.

    The function recomputes every iterate and goes back through all of them. In logarithmic
    coordinates a normalisation is `y = x - logsumexp(x)`, so its gradient is `G - M · ΣG` along the
    same axis.
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
