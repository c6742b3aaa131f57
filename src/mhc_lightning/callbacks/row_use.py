"""How the n-grams of a sample use the rows of a hashed table: rows touched, and collisions.

Shapes: T positions, H heads, N the longest order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowUse(NamedTuple):
    """Counts of each head, int64 [H].

    Attributes:
        touched: Different rows that the sample reads.
        ngrams: Different n-grams of the head's order in the sample.
        colliding: Those of them that have their row in common with another one of them.
    """

    touched: Tensor
    ngrams: Tensor
    colliding: Tensor


def row_use(rows: Tensor, suffixes: Tensor, orders: Sequence[int]) -> RowUse:
    """Count rows and collisions of a sample, on the device and without waiting for it.

    Args:
        rows: int64 [..., H], the row that each head reads at each position.
        suffixes: int64 [..., N], the last tokens (or their classes) at each position, the newest
            first.
        orders: How many of them the n-gram of each head has [H].
    """
    rows, suffixes = rows.flatten(0, -2), suffixes.flatten(0, -2)
    positions = len(rows)
    numbers = _number_ngrams(suffixes)
    ngrams = torch.stack([numbers[order - 1] for order in orders])  # [H, T]
    # One sort brings equal rows together and, within a row, equal n-grams.
    keys = (rows.mT * positions + ngrams).sort(-1).values
    new_ngram, new_row = _starts(keys), _starts(keys // positions)
    group = new_row.cumsum(-1) - 1
    in_row = torch.zeros_like(keys).scatter_add_(-1, group, new_ngram.long()).gather(-1, group)
    colliding = new_ngram & (in_row > 1)
    return RowUse(new_row.sum(-1), new_ngram.sum(-1), colliding.sum(-1))


def _number_ngrams(suffixes: Tensor) -> list[Tensor]:
    """For n from 1 to N a number below T for each position's n-gram [T]; equal ones have it too."""
    numbers = _dense(suffixes[:, 0])
    result = [numbers]
    for tokens in suffixes.unbind(-1)[1:]:
        numbers = _dense(numbers * len(suffixes) + _dense(tokens))
        result.append(numbers)
    return result


def _dense(values: Tensor) -> Tensor:
    """Values [T] numbered from 0 in ascending order; equal ones have the same number."""
    ordered, places = values.sort()
    return torch.empty_like(values).scatter_(0, places, _starts(ordered).cumsum(0) - 1)


def _starts(ordered: Tensor) -> Tensor:
    """True where a sorted row [..., T] has a value for the first time."""
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return starts
