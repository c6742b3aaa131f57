"""Initial values: the same for every way to cut a matrix into parts."""

import pytest
import torch
from torch import Tensor, nn

from mhc_lightning.modules import initialisation
from mhc_lightning.modules.initialisation import fill_normal, plan_normal

SHAPES = [torch.Size([50, 8]), torch.Size([5, 4, 70]), torch.Size([3, 2])]


def draw(cuts: int, seed: int = 3) -> list[Tensor]:
    """The matrices, each filled in parts of as many rows as ``torch.chunk`` gives them."""
    whole = [torch.full(shape, torch.nan) for shape in SHAPES]
    for matrix, shape in zip(whole, SHAPES, strict=True):
        each = -(-len(matrix) // cuts)
        for cut in range(cuts):
            part = matrix[each * cut : each * (cut + 1)]
            fill_normal(part, each * cut, shape, 0.5, seed)
    return whole


@pytest.mark.parametrize("group", [32, 2**16])
def test_parts_are_those_of_the_whole(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialisation, "_GROUP", group)
    whole = draw(1)
    for cuts in (2, 3, 7):
        assert all(map(torch.equal, draw(cuts), whole)), cuts
    assert not torch.equal(draw(1, seed=9)[0], whole[0])


def test_values_are_normal_and_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialisation, "_GROUP", 1000)
    network = nn.Sequential(*(nn.Linear(100, 1000, bias=False) for _ in range(2)))
    for planned in plan_normal(network, 2**32 - 5, 0.5):  # seeds run over
        planned()
    first, second = (layer.weight.detach() for layer in network)
    for matrix in (first, second):
        assert abs(float(matrix.mean())) < 0.01
        assert float(matrix.std()) == pytest.approx(0.5, rel=0.01)
        assert float(matrix.abs().max()) < 3.5
    rows = torch.cat([first, second])
    correlations = torch.corrcoef(rows) - torch.eye(2000)
    assert correlations.abs().max() < 0.6, "two rows are the same"


def test_other_precisions_hold_the_same_values() -> None:
    exact, rounded = torch.empty(9, 5), torch.empty(9, 5, dtype=torch.bfloat16)
    for matrix in (exact, rounded):
        fill_normal(matrix, 0, matrix.shape, 1.0, 1)
    assert torch.equal(exact.bfloat16(), rounded)
