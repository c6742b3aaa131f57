"""Checkpoints that are folders, written by one process; `tests/strategies` has several."""

import errno
import os
import threading

import pytest
import torch
from noisy_run import newest, run, sigterm_at
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mhc_lightning.checkpoints import folder_writing
from mhc_lightning.checkpoints.folder_writing import save_folder
from mhc_lightning.checkpoints.names import saved_steps
from mhc_lightning.checkpoints.reading import load_checkpoint, load_whole_folder

FOLDERS = {"sharded": True}
BACKGROUND = {"asynchronous": True}
SHARD = "__0_0.distcp"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(metrics, the last file) of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    file = torch.load(newest(folder), weights_only=False)
    return (folder / "metrics.csv").read_text(), file


def same(one, two):
    """Whether two nested values are the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("form", [FOLDERS, BACKGROUND], ids=["folder", "background"])
def test_a_folder_holds_what_a_file_does_and_training_is_not_disturbed(
    tmp_path, uninterrupted, form
):
    run(tmp_path, keep_last=None, **form)
    metrics, file = uninterrupted
    assert (tmp_path / "metrics.csv").read_text() == metrics
    assert newest(tmp_path).name == "step_00000012"
    assert same(load_whole_folder(newest(tmp_path), trusted=True), file)
    # Others read it too.
    dcp_to_torch_save(newest(tmp_path), tmp_path / "theirs")
    theirs = torch.load(tmp_path / "theirs", weights_only=False)
    assert same(theirs["state_dict"], file["state_dict"])
    resumed = []
    run(tmp_path, resume=tmp_path / "checkpoints/step_00000004",
        hook=lambda *what: resumed.append(what[0]), **form)  # fmt: skip
    assert (tmp_path / "metrics.csv").read_text() == metrics and resumed
    assert same(load_whole_folder(newest(tmp_path), trusted=True), file)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_00000008", "step_00000012", "last"}, "replaced, and nothing left aside"


@pytest.mark.parametrize("forms", [(FOLDERS, {}), ({}, BACKGROUND)])
def test_sigterm_resumes_bit_for_bit_from_either_form_to_either(tmp_path, uninterrupted, forms):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, hook=sigterm_at("val", 5, 1), **forms[0])
    assert stopped.value.code == 143
    name = "step_00000005" if forms[0] else "step_00000005.ckpt"
    assert os.readlink(tmp_path / "checkpoints/last") == newest(tmp_path).name == name
    seen = []
    run(tmp_path, resume=newest(tmp_path), hook=lambda *what: seen.append(what[0]), **forms[1])
    assert seen.count("val") == 6, "that of step 5 was run again"
    assert (tmp_path / "metrics.csv").read_text() == uninterrupted[0]
    assert newest(tmp_path).is_dir() == bool(forms[1])


def test_a_step_saved_again_in_the_other_form_is_there_once(tmp_path):
    run(tmp_path, steps=8, keep_last=None)
    run(tmp_path, steps=8, keep_last=None, keep_best=1, **FOLDERS,
        resume=tmp_path / "checkpoints/step_00000004.ckpt")  # fmt: skip
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    best = os.readlink(tmp_path / "checkpoints/best")
    assert best in ("step_00000005", "step_00000008")
    assert names == {"step_00000004.ckpt", "step_00000005", "step_00000008", "last", "best"}


def test_retention_and_links(tmp_path):
    run(tmp_path, 11, every_n_steps=1, keep_last=2, keep_every=4, keep_best=1, **BACKGROUND)
    folder = tmp_path / "checkpoints"
    best = int(os.readlink(folder / "best").removeprefix("step_"))
    assert best in (5, 10, 11)
    assert saved_steps(folder) == sorted({4, 8, 10, 11, best})
    assert os.readlink(folder / "last") == "step_00000011"
    assert not list(folder.glob(".aside*"))


@pytest.mark.parametrize("form", [FOLDERS, BACKGROUND], ids=["folder", "background"])
def test_a_full_disk_is_survived_with_its_reason(tmp_path, monkeypatch, form):
    real = torch.save
    steps = []

    def save(content, stream, *args):
        if isinstance(content, torch.Tensor) and content.shape == (8, 8):
            steps.append(1)
            if 3 < len(steps) <= 5:  # each checkpoint has three such tensors
                stream.raw.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise RuntimeError("unexpected pos 128 vs 0")
        real(content, stream, *args)

    monkeypatch.setattr(torch, "save", save)
    with pytest.warns(RuntimeWarning) as warned:
        run(tmp_path, steps=11, every_n_steps=3, **form)  # saves at 3, 6, 9 and 11
    messages = [str(w.message) for w in warned if "could not save" in str(w.message)]
    assert len(messages) == 2
    assert "step 6" in messages[0] and "No space left on device" in messages[0]
    assert saved_steps(tmp_path / "checkpoints") == [3, 11]
    assert not list((tmp_path / "checkpoints").glob(".aside*"))


def test_one_is_written_at_a_time_and_the_end_waits(tmp_path, monkeypatch):
    """Training overtakes a slow write, which goes on from a copy of the step it is named for."""
    passed, running, most = threading.Event(), [], []
    real = folder_writing._Writer.write_data

    def slow(self, *args):
        running.append(1)
        most.append(len(running))
        if self._name.name.endswith("04"):
            assert passed.wait(60)
        try:
            return real(self, *args)
        finally:
            running.pop()

    def hook(where, trainer, batch_idx):
        if trainer.global_step == 7:
            assert not saved_steps(tmp_path / "checkpoints"), "it is still being written"
            passed.set()
        if trainer.global_step == 11:
            raise RuntimeError("power cut")

    monkeypatch.setattr(folder_writing._Writer, "write_data", slow)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, hook=hook, keep_last=None, **BACKGROUND)
    assert saved_steps(tmp_path / "checkpoints") == [4, 8] and max(most) == 1
    run(tmp_path / "sync", steps=8, **FOLDERS, keep_last=None)
    for step in (4, 8):
        one, two = (
            load_whole_folder(folder / f"checkpoints/step_{step:08d}", trusted=True)
            for folder in (tmp_path, tmp_path / "sync")
        )
        assert same(one, two), step


def test_nothing_has_the_name_before_all_of_it_is_there(tmp_path, saved, monkeypatch):
    """And a write that fails leaves what had the name."""
    before = load_checkpoint(saved, trusted=False)["state_dict"]["a"]
    seen = []
    real = FileSystemReader.read_metadata

    def write(rest, path):
        seen.extend(sorted(file.name for file in path.parent.iterdir()))
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(folder_writing, "write_checkpoint", write)
    done = save_folder({"state_dict": {"a": torch.zeros(9)}}, {}, saved, lambda: None, group=None,
                       asynchronous=False)  # fmt: skip
    assert isinstance(done.exception(), OSError) and done.exception().errno == errno.EDQUOT
    assert seen == [SHARD]
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]
    assert torch.equal(load_checkpoint(saved, trusted=False)["state_dict"]["a"], before)
    assert real is FileSystemReader.read_metadata
