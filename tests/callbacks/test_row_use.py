"""Rows touched and collisions, against counting with sets."""

import pytest
import torch
from torch import Tensor

from mhc_lightning.callbacks.row_use import row_use


def counted_by_hand(rows: Tensor, suffixes: Tensor, orders: list[int]) -> list[list[int]]:
    counts: list[list[int]] = [[], [], []]
    for head, order in enumerate(orders):
        ngrams_of_row: dict[int, set[tuple[int, ...]]] = {}
        for row, suffix in zip(
            rows[..., head].flatten().tolist(), suffixes.flatten(0, -2).tolist(), strict=True
        ):
            ngrams_of_row.setdefault(row, set()).add(tuple(suffix[:order]))
        sets = ngrams_of_row.values()
        counts[0].append(len(sets))
        counts[1].append(sum(len(ngrams) for ngrams in sets))
        counts[2].append(sum(len(ngrams) for ngrams in sets if len(ngrams) > 1))
    return counts


@pytest.mark.parametrize("modulus", [3, 40, 10**9])
def test_counts_are_those_of_sets(modulus: int) -> None:
    orders = [2, 2, 3, 4]
    suffixes = torch.randint(0, 6, (4, 50, 4)) * 10**6  # many n-grams come again
    factors = torch.tensor([[7, 11, 0, 0], [5, 3, 0, 0], [13, 17, 19, 0], [23, 29, 31, 37]])
    starts = torch.arange(4) * 2**31
    rows = (suffixes // 10**6 @ factors.T) % modulus + starts
    use = row_use(rows, suffixes, orders)
    wanted = counted_by_hand(rows, suffixes, orders)
    assert [counts.tolist() for counts in use] == wanted


def test_a_known_sample() -> None:
    # 2-grams (1, 2), (1, 2), (3, 2), (4, 2); head 0 gives the last two one row, head 1 none.
    suffixes = torch.tensor([[1, 2], [1, 2], [3, 2], [4, 2]])
    rows = torch.tensor([[0, 10], [0, 10], [5, 11], [5, 12]])
    use = row_use(rows, suffixes, [2, 2])
    assert use.touched.tolist() == [2, 3]
    assert use.ngrams.tolist() == [3, 3]
    assert use.colliding.tolist() == [2, 0]
