"""Damage to checkpoints is found and named, and no code in an untrusted one runs."""

import os
import pickle

import pytest
import torch

from mhc_lightning.checkpoints.file_writing import write_checkpoint
from mhc_lightning.checkpoints.folder_index import INDEX, RUN
from mhc_lightning.checkpoints.folder_writing import save_folder
from mhc_lightning.checkpoints.reading import load_checkpoint
from mhc_lightning.checkpoints.refusals import fault_in
from mhc_lightning.errors import UserError

SHARD = "__0_0.distcp"


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_faults_of_a_file_are_found_and_named(tmp_path):
    path = tmp_path / "step_00000001.ckpt"
    write_checkpoint({"state_dict": {"a": torch.randn(5000)}}, path)
    assert fault_in(path) is None
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "cut short" in fault_in(path)
    path.write_bytes(b"")
    assert "0 bytes" in fault_in(path)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(flipped)
    assert "checksum" in fault_in(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
        (lambda path: os.truncate(path / SHARD, 3000), f"{SHARD} is cut short: 3000 of"),
        (lambda path: flip(path / SHARD), f"in {SHARD} does not match its checksum"),
        (lambda path: (path / INDEX).unlink(), f"{INDEX} is missing"),
        (lambda path: os.truncate(path / INDEX, 100), f"{INDEX} cannot be read"),
        (lambda path: (path / RUN).unlink(), f"{RUN} is missing"),
        (lambda path: os.truncate(path / RUN, 100), f"{RUN} is not a complete"),
        (lambda path: flip(path / RUN), f"{RUN} is damaged"),
    ],
)
def test_faults_of_a_folder_are_found_and_named(saved, damage, reason):
    assert fault_in(saved) is None
    damage(saved)
    assert reason in fault_in(saved)


class Gadget:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_no_code_of_an_untrusted_folder_runs(tmp_path, saved, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (saved / INDEX).write_bytes(pickle.dumps(Gadget()))
    with pytest.raises(UserError, match="is no part of an index"):
        load_checkpoint(saved, trusted=False)
    assert "cannot be read" in fault_in(saved)
    save_folder({"state_dict": {"a": Gadget()}}, {"state_dict": {}}, saved, lambda: None,
                group=None, asynchronous=False).result()  # fmt: skip
    with pytest.raises(UserError, match="no tensors"):
        load_checkpoint(saved, trusted=False)
    write_checkpoint({"state_dict": {}, "callbacks": Gadget()}, saved / RUN)
    with pytest.raises(UserError, match="pickled Python objects"):
        load_checkpoint(saved, trusted=False)
    assert not (tmp_path / "owned").exists()


class Plain:
    pass


def test_pickled_objects_are_rebuilt_only_from_trusted_files(tmp_path):
    path = tmp_path / "step_00000001.ckpt"
    write_checkpoint({"state_dict": {}, "callbacks": {"x": Plain()}}, path)
    with pytest.raises(UserError, match="pickled Python objects"):
        load_checkpoint(path, trusted=False)
    assert isinstance(load_checkpoint(path, trusted=True)["callbacks"]["x"], Plain)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "no `state_dict`"),
        ({"weights": {}}, "no `state_dict`"),
        ({"state_dict": [1]}, "its `state_dict` is no mapping"),
    ],
)
def test_a_file_without_a_model_is_refused(tmp_path, content, reason):
    path = tmp_path / "step_00000001.ckpt"
    write_checkpoint(content, path)
    with pytest.raises(UserError, match=rf"step_00000001\.ckpt has no model in it \({reason}\)"):
        load_checkpoint(path, trusted=False)


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(UserError, match=r"note\.txt cannot be loaded"):
        load_checkpoint(tmp_path / "note.txt", trusted=False)
