"""Convex combinations of permutation matrices: every doubly stochastic matrix is one (Birkhoff)."""

from itertools import permutations
from math import factorial

import torch
from torch import Tensor

from mhc_lightning.kernels.transforms import ordinary

# 4 streams have 24 permutations, 5 have 120 and 6 have 720.
MOST_PERMUTED = 4
# As in the code of mHC-lite and KromHC: weights near e^-8 make a matrix near the identity.
_OTHERS = -8.0


def starting_logits(size: int) -> list[float]:
    """Logits of all permutations, the identity first, for a matrix near the identity."""
    return [0.0] + [_OTHERS] * (factorial(size) - 1)


def mixed_permutations(logits: Tensor, size: int) -> Tensor:
    """The mean of all permutation matrices, weighted by a softmax of the logits.

    The result is doubly stochastic up to the rounding of the sums.

    Args:
        logits: [..., size!], in the lexicographic order of permutations.
        size: Rows and columns.

    Returns:
        [..., size, size]; entry (i, j) is the sum of the weights of permutations that take j to i.
    """
    matrices = _permutation_matrices(size, logits)
    # No matrix product: TF32 would round the weights, and the sums would not be one.
    return (logits.softmax(-1)[..., None, None] * matrices).sum(-3)


def _permutation_matrices(size: int, logits: Tensor) -> Tensor:
    """[size!, size, size]; cached, since copying them to a GPU would wait for it."""
    if not ordinary(logits):
        return _new_permutation_matrices(size, logits.dtype, logits.device)
    key = (size, logits.dtype, logits.device)
    if key not in _cached:
        with torch.inference_mode(False):
            _cached[key] = _new_permutation_matrices(*key)
    return _cached[key]


_cached: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _new_permutation_matrices(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    order = torch.tensor(list(permutations(range(size))), device=device)
    return (order[..., None] == torch.arange(size, device=device)).to(dtype)
