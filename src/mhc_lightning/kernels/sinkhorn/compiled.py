"""Sinkhorn-Knopp by compiled kernels: iterates stay in a core's registers and cache."""

import torch
from torch import Tensor

from mhc_lightning.kernels.compiled_support.library import call


def sinkhorn_forward(logits: Tensor, num_iterations: int) -> Tensor:
    """Matrices [n, n, tokens] for contiguous logits [n, n, tokens]."""
    n, _, tokens = logits.shape
    matrices = torch.empty_like(logits)
    given = (logits, matrices, n, tokens, num_iterations)
    call("sinkhorn_forward", logits.dtype, *given, streams=logits)
    return matrices


def sinkhorn_backward(grad: Tensor, logits: Tensor, num_iterations: int) -> Tensor:
    """Gradient [n, n, tokens] of the logits, given that of the matrices."""
    n, _, tokens = logits.shape
    results = torch.empty_like(logits)
    given = (grad.contiguous(), logits, results, n, tokens, num_iterations)
    call("sinkhorn_backward", logits.dtype, *given, streams=logits)
    return results
