"""Tensors of a folder are described without reading, and read in part."""

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from mhc_lightning.checkpoints.saved_tensors import SavedTensors, below, describe
from mhc_lightning.errors import UserError


def test_tensors_are_read_as_they_are_asked_for(saved, monkeypatch):
    tensors = SavedTensors(saved, "state_dict.")
    assert {name: tuple(t.shape) for name, t in tensors.on_meta.items()} == {
        "a": (50, 20), "b": (3,)}  # fmt: skip
    read: list[str] = []
    real = FileSystemReader.read_data

    def noted(self, plan, planner):
        read.extend(i.dest_index.fqn for i in plan.items)
        return real(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", noted)
    assert list(tensors) == ["a", "b"] and len(tensors) == 2 and not read
    assert tensors["b"].shape == (3,) and read == ["state_dict.b"]
    with pytest.raises(UserError, match=r"step_00000001 cannot be loaded: .*state_dict\.c"):
        tensors.load_into({"c": torch.empty(3)})
    with pytest.raises(UserError, match=r"(?i)size"):
        tensors.load_into({"b": torch.empty(4)})


def test_tensors_are_described_and_selected_without_reading(saved, monkeypatch):
    monkeypatch.setattr(FileSystemReader, "read_data", lambda *_: pytest.fail("it reads"))
    whole = SavedTensors(saved)
    assert describe(below(whole, "state_dict."))["a"].is_meta
    plain = {"model.a": torch.ones(2), "other": torch.ones(3)}
    assert describe(plain) is plain
    assert list(below(plain, "model.")) == ["a"] and list(below(whole, "state_dict.")) == ["a", "b"]
