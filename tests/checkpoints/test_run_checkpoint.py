"""Runs that are saved resume exactly, whatever ended them, and keep the right checkpoints."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from noisy_run import Noisy, newest, run, sigterm_at
from torch.utils.data import DataLoader

from mhc_lightning.checkpoints import file_writing
from mhc_lightning.checkpoints.names import saved_steps
from mhc_lightning.checkpoints.reading import load_checkpoint
from mhc_lightning.checkpoints.refusals import fault_in
from mhc_lightning.checkpoints.run_checkpoint import RunCheckpoint
from mhc_lightning.errors import UserError


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return (folder / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("stage", "step", "batch", "saved"),
    [
        ("train", 6, 0, 7),  # between two micro-batches: that optimizer step is completed first
        ("train", 6, 2, 7),
        ("train", 4, 2, 5),  # a validation follows the step: left to the resumed run
        ("val", 5, 1, 5),  # within a validation: run again from its start
        ("val", 10, 2, 10),
        ("train", 7, 1, 8),  # a periodic checkpoint falls on the same step
    ],
)
def test_sigterm_saves_a_whole_step_and_resumes_bit_for_bit(
    tmp_path, uninterrupted, stage, step, batch, saved
):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, hook=sigterm_at(stage, step, batch))
    assert stopped.value.code == 143
    assert newest(tmp_path).name == f"step_{saved:08d}.ckpt"
    assert os.readlink(tmp_path / "checkpoints/last") == f"step_{saved:08d}.ckpt"
    run(tmp_path, resume=newest(tmp_path))
    assert (tmp_path / "metrics.csv").read_text() == uninterrupted


class Averages(WeightAveraging):
    """Validates the averaged weights, which it lends the module until the validation's end."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None


def end_of(folder):
    """(metrics, weights) of a run."""
    checkpoint = load_checkpoint(newest(folder), trusted=True)
    return (folder / "metrics.csv").read_text(), checkpoint["state_dict"]["layer.weight"]


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """(metrics, weights) of a run of 9 steps with averages that nothing stopped."""
    folder = tmp_path_factory.mktemp("averaged")
    run(folder, 9, callbacks=[Averages()])
    return end_of(folder)


@pytest.mark.parametrize("form", [{}, {"asynchronous": True}], ids=["file", "background"])
def test_sigterm_in_a_validation_of_other_weights_saves_those_of_the_training(
    tmp_path, averaged, form
):
    with pytest.raises(SystemExit):
        run(tmp_path, 9, sigterm_at("val", 5, 1), callbacks=[Averages()], **form)
    assert saved_steps(tmp_path / "checkpoints") == [4, 5]
    run(tmp_path, 9, resume=newest(tmp_path), callbacks=[Averages()], **form)
    metrics, weights = end_of(tmp_path)
    assert metrics == averaged[0] and torch.equal(weights, averaged[1])


def test_modules_of_any_dtype_are_saved(tmp_path):
    class Cast(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.complex64):
                for size in (3, 0):
                    parameter = torch.nn.Parameter(torch.ones(size, dtype=dtype))
                    pl_module.register_parameter(f"{dtype}{size}".replace(".", "_"), parameter)
            pl_module.counts = torch.nn.Parameter(torch.ones(3).long(), requires_grad=False)

    run(tmp_path, 6, callbacks=[Cast()])
    assert saved_steps(tmp_path / "checkpoints") == [4, 6]


@pytest.fixture(scope="module")
def every_second(tmp_path_factory):
    """The folder of a run that saved every second step."""
    folder = tmp_path_factory.mktemp("every second")
    run(folder, every_n_steps=2, keep_last=None)
    return folder


@pytest.mark.parametrize(("step", "validations"), [(4, 6), (8, 3), (10, 0)])
def test_every_periodic_checkpoint_resumes_bit_for_bit(
    tmp_path, uninterrupted, every_second, step, validations
):
    # 10 carries a validation: written after it, so the resumed run does not repeat it.
    shutil.copytree(every_second, tmp_path, symlinks=True, dirs_exist_ok=True)
    checkpoint = tmp_path / f"checkpoints/step_{step:08d}.ckpt"
    seen = []
    run(tmp_path, resume=checkpoint, hook=lambda *what: seen.append(what[0]))
    assert (tmp_path / "metrics.csv").read_text() == uninterrupted
    assert seen.count("val") == validations


def test_resuming_an_earlier_step_makes_it_the_last(tmp_path, uninterrupted):
    run(tmp_path, keep_last=None)

    def hook(where, trainer, batch_idx):
        if trainer.global_step == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, resume=tmp_path / "checkpoints/step_00000004.ckpt", hook=hook)
    assert newest(tmp_path).name == "step_00000004.ckpt"
    run(tmp_path, resume=newest(tmp_path))
    assert (tmp_path / "metrics.csv").read_text() == uninterrupted


def test_retention(tmp_path):
    run(tmp_path, steps=11, every_n_steps=1, keep_last=2, keep_every=4)
    assert saved_steps(tmp_path / "checkpoints") == [4, 8, 10, 11]
    link = tmp_path / "checkpoints/last"
    assert os.readlink(link) == "step_00000011.ckpt" and link.resolve().is_file()


def test_best_is_kept_by_the_monitored_metric(tmp_path):
    run(tmp_path, steps=20, every_n_steps=50, keep_last=1, keep_best=1, mode="max")
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("val/loss")
    values = {int(row[0]): float(row[column]) for row in rows[1:] if row[column]}
    best = max(values, key=lambda step: values[step])
    assert os.readlink(tmp_path / "checkpoints/best") == f"step_{best:08d}.ckpt"
    assert saved_steps(tmp_path / "checkpoints") == sorted({best, 20})


def test_a_monitor_that_nothing_logs_is_named(tmp_path):
    with pytest.raises(UserError, match=r"val/accuracy.*val/loss"):
        run(tmp_path, keep_best=1, monitor="val/accuracy")


class Scored(pl.Callback):
    """Gives validations the scores that are wanted."""

    def __init__(self, scores):
        self.scores = scores

    def on_validation_epoch_end(self, trainer, pl_module):
        score = self.scores[trainer.global_step]
        pl_module.log_dict({"score": score, "accuracy": 10 - score})


def test_a_best_that_cannot_be_written_displaces_none(tmp_path, monkeypatch):
    """Of the validations at 5, 10 and 15 the later are better; that at 15 meets a full disk."""
    real = file_writing.torch.save

    def save(content, stream):
        if content["global_step"] == 15:
            stream.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise RuntimeError("unexpected pos 128 vs 0")
        real(content, stream)

    monkeypatch.setattr(file_writing.torch, "save", save)
    scored = Scored({5: 4.0, 10: 3.0, 15: 2.0, 20: 9.0})
    settings = {"every_n_steps": 3, "keep_last": 1, "keep_best": 1, "monitor": "score"}
    with pytest.warns(RuntimeWarning, match="could not save the checkpoint of step 15"):
        run(tmp_path, 20, callbacks=[scored], **settings)
    assert saved_steps(tmp_path / "checkpoints") == [10, 20]
    assert os.readlink(tmp_path / "checkpoints/best") == "step_00000010.ckpt"


def links(folder):
    return {p.name: os.readlink(p) for p in (folder / "checkpoints").iterdir() if p.is_symlink()}


@pytest.mark.parametrize(("form", "keep_last"), [({}, None), ({"sharded": True}, 1)])
def test_best_is_of_the_branch_that_goes_on(tmp_path, form, keep_last):
    """Its later steps are worse than those of the branch that was given up, which they replace."""
    settings = {"every_n_steps": 5, "keep_best": 1, "monitor": "score", **form}
    run(tmp_path, 15, callbacks=[Scored({5: 3.0, 10: 2.0, 15: 1.0})], keep_last=None, **settings)
    end = "" if form else ".ckpt"
    assert links(tmp_path)["best"] == f"step_00000015{end}"
    worse = Scored({10: 8.0, 15: 7.0, 20: 6.0})
    earlier = tmp_path / f"checkpoints/step_00000005{end}"
    for steps in (10, 15, 20):
        run(tmp_path, steps, resume=earlier, callbacks=[worse], keep_last=keep_last, **settings)
        assert links(tmp_path)["best"] == f"step_00000005{end}"
        earlier = newest(tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == ([5, 20] if keep_last else [5, 10, 15, 20])


def test_there_is_no_best_where_a_branch_begins_without_one(tmp_path):
    settings = {"every_n_steps": 4, "keep_last": None, "keep_best": 1, "monitor": "score"}
    run(tmp_path, 5, callbacks=[Scored({5: 3.0})], **settings)
    assert links(tmp_path)["best"] == "step_00000005.ckpt"
    run(tmp_path, 6, resume=tmp_path / "checkpoints/step_00000004.ckpt",
        callbacks=[Scored({5: float("nan")})], **settings)  # fmt: skip
    assert "best" not in links(tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == [4, 5, 6]


def test_scores_of_another_metric_are_not_compared(tmp_path):
    settings = {"every_n_steps": 5, "keep_best": 1, "keep_last": 1, "monitor": "score"}
    run(tmp_path, 5, callbacks=[Scored({5: 1.0})], **settings)
    settings |= {"monitor": "accuracy"}
    with pytest.warns(UserWarning, match=r"chosen anew; those so far \(\[5\]\) are kept"):
        run(tmp_path, 10, resume=newest(tmp_path), callbacks=[Scored({10: 0.5})], **settings)
    assert links(tmp_path)["best"] == "step_00000010.ckpt"
    run(tmp_path, 15, resume=newest(tmp_path), callbacks=[Scored({15: 0.1})], **settings)
    assert links(tmp_path)["best"] == "step_00000010.ckpt"
    assert saved_steps(tmp_path / "checkpoints") == [5, 10, 15], "5 is kept for good"


@pytest.mark.parametrize(("form", "name"), [({}, "last"), ({"sharded": True}, "best")])
def test_copies_in_place_of_links_are_not_written_over(tmp_path, form, name):
    """As tools that follow links leave them."""
    run(tmp_path, 4, **form)
    saved, copy = newest(tmp_path), tmp_path / "checkpoints" / name
    copy.unlink(missing_ok=True)
    (shutil.copytree if form else shutil.copy)(saved, copy)
    for resume in (copy, saved):
        with pytest.raises(UserError, match=f"{name} should be a link, .*; delete it if"):
            run(tmp_path, 8, resume=resume, **form)
    assert not fault_in(copy) and not fault_in(saved)
    (shutil.rmtree if form else os.unlink)(copy)
    run(tmp_path, 8, resume=saved, **form)
    assert saved_steps(tmp_path / "checkpoints") == [4, 8]


def test_a_file_system_without_links_is_named_before_the_training(tmp_path, monkeypatch):
    def refuse(self, target, target_is_directory=False):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(UserError, match=r"no symbolic links, which last and best are.*output_dir"):
        run(tmp_path, hook=lambda *_: pytest.fail("it trains"))


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({"max_epochs": 2}, 10),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 4),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": 1, "val_check_interval": 1.0}, 5),
    ],
)
def test_the_end_of_a_run_of_epochs_is_saved(tmp_path, settings, step):
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[RunCheckpoint(tmp_path, every_n_steps=None)],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    rows: Any = [torch.sin(torch.arange(8.0) + k) for k in range(10)]
    trainer.fit(Noisy(), DataLoader(rows, batch_size=2))
    assert trainer.global_step == step and saved_steps(tmp_path) == [step]


@pytest.mark.parametrize(
    ("end", "form"),
    [(4, {"asynchronous": True}), (5, {"sharded": True}), (6, {})],
    ids=["due", "with a validation", "neither"],
)
def test_a_finished_run_is_made_longer_from_the_weights_of_its_training(
    tmp_path, averaged, end, form
):
    """At the end of a run, averages take the place of the module's weights."""
    run(tmp_path, end, callbacks=[Averages()], **form)
    run(tmp_path, 9, resume=newest(tmp_path), callbacks=[Averages()], **form)
    assert (tmp_path / "metrics.csv").read_text() == averaged[0]


def test_disk_full_is_survived_with_a_warning_per_failure(tmp_path, monkeypatch):
    real = file_writing.torch.save
    calls = []

    def save(content, stream):
        calls.append(1)
        if len(calls) in (2, 3):
            stream.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise RuntimeError("unexpected pos 128 vs 0")
        real(content, stream)

    monkeypatch.setattr(file_writing.torch, "save", save)
    with pytest.warns(RuntimeWarning) as warned:
        run(tmp_path, steps=11, every_n_steps=3)  # saves at 3, 6, 9 and 11
    messages = [str(w.message) for w in warned if "could not save" in str(w.message)]
    assert len(messages) == 2
    assert "step 6" in messages[0] and "No space left on device" in messages[0]
    assert saved_steps(tmp_path / "checkpoints") == [3, 11]
    assert not list((tmp_path / "checkpoints").glob(".aside*"))


@pytest.mark.parametrize(
    "settings",
    [
        {"every_n_steps": 0},
        {"keep_last": 0},
        {"keep_best": -1},
        {"mode": "least"},
        {"sharded": "often"},
        {"asynchronous": True, "sharded": False},
    ],
)
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(UserError, match=f"checkpoint.{next(iter(settings))}"):
        RunCheckpoint(Path("x"), **settings)
