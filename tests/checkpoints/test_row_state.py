"""The state of a table's rows in a folder: written in pieces, read by the rows that overlap."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_lightning.checkpoints import row_state
from mhc_lightning.checkpoints.folder_writing import save_folder
from mhc_lightning.checkpoints.row_state import joined, overlapping, parse_piece, pieces
from mhc_lightning.checkpoints.saved_tensors import SavedTensors
from mhc_lightning.modules.memory.row_store import RowStore, row_gradient
from mhc_lightning.optimizers.adamw import RowAdamW
from mhc_lightning.optimizers.row_updates import RowState

NAME, ROWS, WIDTH = "blocks.1.memory.table.weight", 100, 3
TOUCHED = [(70, 3, 99), (5, 3), (40, 41, 42, 8)]


class Part(RowStore):
    """The store of a process that updates some of the rows."""

    def __init__(self, weight: nn.Parameter, first: int, end: int) -> None:
        super().__init__(weight)
        self.first, self.end = first, end

    def held(self) -> tuple[Tensor, int]:
        return self.weight.detach()[self.first : self.end], self.first


def trained() -> tuple[nn.Parameter, RowState]:
    weight = nn.Parameter(torch.zeros(ROWS, WIDTH))
    optimizer = RowAdamW([{"params": [weight], "rows": "adam"}], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for touched in TOUCHED:
        values = torch.randn(len(touched), WIDTH, generator=generator)
        weight.grad = row_gradient(weight, torch.tensor(sorted(touched)), values)
        optimizer.step()
    return weight, optimizer.row_states()[weight]


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Any:
    """A state in pieces of three rows, the last one shorter, and another tensor beside it."""
    monkeypatch.setattr(row_state, "_PIECE", 3)
    _, state = trained()
    tensors = {**pieces(state, NAME), f"exp_avg.{NAME}.bias": torch.ones(2)}
    folder = tmp_path / "step_00000001"
    save_folder(
        {"state": tensors}, {}, folder, lambda: None, group=None, asynchronous=False
    ).result()
    return state, SavedTensors(folder, "state.")


def test_pieces_are_named_by_their_rows(saved):
    state, tensors = saved
    assert state["rows"].tolist() == [3, 5, 8, 40, 41, 42, 70, 99]
    assert state["step"].tolist() == [2, 1, 1, 1, 1, 1, 1, 1]
    found = {piece[2:] for key in tensors if (piece := parse_piece(key)) is not None}
    assert found == {(3, 8), (40, 42), (70, 99)}
    assert parse_piece(f"exp_avg.{NAME}") is None


@pytest.mark.parametrize(
    ("first", "end", "names"),
    [(0, 50, {(3, 8), (40, 42)}), (50, 100, {(70, 99)}), (0, 100, None), (9, 40, set())],
)
def test_a_process_reads_the_pieces_that_overlap_with_its_rows(saved, first, end, names):
    state, tensors = saved
    weight = nn.Parameter(torch.zeros(ROWS, WIDTH))
    Part(weight, first, end)
    read: list[str] = []
    load = tensors.load_into
    tensors.load_into = lambda targets: (read.extend(targets), load(targets))
    entries = overlapping(tensors, {NAME: weight, "other.weight": weight}).get(NAME, {})
    if names is not None:
        assert {(p.first, p.last) for key in read if (p := parse_piece(key))} == names
        assert len(read) == 4 * len(names)
    loaded = RowState(weight, "adam")
    if entries:
        loaded.load(entries)
    own = (state["rows"] >= first) & (state["rows"] < end)
    for entry, tensor in state.items():
        assert torch.equal(loaded[entry], tensor[own])
    assert loaded.is_whole == (end - first == ROWS)


def test_pieces_are_put_together_in_the_order_of_their_rows(saved):
    state, tensors = saved
    whole = joined(dict(reversed(tensors.read().items())))
    assert whole.pop(f"exp_avg.{NAME}.bias").tolist() == [1, 1]
    assert {key.removesuffix(f".{NAME}") for key in whole} == set(state)
    for entry, tensor in state.items():
        assert torch.equal(whole[f"{entry}.{NAME}"], tensor)
