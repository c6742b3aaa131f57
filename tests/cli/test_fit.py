"""`fit`: what a run leaves behind, and how it resumes, bit for bit, and stops."""

import json
import os
import signal
import time

import pytest
import torch
import yaml


def test_a_run_leaves_everything_in_its_folder_and_is_not_overwritten(command):
    output_dir = "out dir = 1, {x} ${y}"
    command.run("fit", f"output_dir={output_dir}", "checkpoint.keep_every=4")
    folder = command.folder / output_dir
    assert sorted(os.listdir(command.folder)) == [output_dir]
    names = sorted(os.listdir(folder))
    events = [name for name in names if name.startswith("events.out.tfevents.")]
    assert len(events) == 1
    assert [n for n in names if n not in events] == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.csv",
    ]
    assert sorted(os.listdir(folder / "checkpoints")) == [
        "last",
        "step_00000004.ckpt",
        "step_00000006.ckpt",
    ]
    assert os.readlink(folder / "checkpoints/last") == "step_00000006.ckpt"

    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["device"]
    assert "commit" in environment
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["dim"] == 16 and config["trainer"]["max_steps"] == 6

    rows = command.metrics(folder)
    assert list(rows) == [1, 2, 3, 4, 5, 6]
    for step, row in rows.items():
        assert {"train/loss", "train/grad_norm", "train/learning_rate"} <= set(row)
        assert ("val/loss" in row) == (step % 3 == 0)
    assert {"amax_gain/composite/backward", "stream_diversity/mean"} <= set(rows[1])
    for tag in ("train/loss", "val/perplexity", "amax_gain/composite/backward"):
        written = [(step, float(row[tag])) for step, row in rows.items() if tag in row]
        shown = command.points(tag, folder)
        assert [step for step, _ in shown] == [step for step, _ in written]
        assert [v for _, v in shown] == pytest.approx([v for _, v in written], rel=1e-6)

    before = (folder / "metrics.csv").read_bytes()
    _, errors = command.run("fit", f"output_dir={output_dir}", code=2)
    assert errors.splitlines()[-1].startswith("error: ") and "ckpt_path=last" in errors
    assert (folder / "metrics.csv").read_bytes() == before

    # The resolved configuration is an experiment itself, and says the same.
    _, errors = command.run(
        "fit", f"output_dir={output_dir}", "ckpt_path=last", config=folder / "config.yaml"
    )
    assert "the run is complete" in errors
    assert yaml.safe_load((folder / "config.yaml").read_text())["logger"] == config["logger"]
    assert command.metrics(folder) == rows
    few = ("callbacks.stream_matrices=null", "callbacks.dashboard=null")  # which take longest
    other = ("output_dir=other", "ckpt_path=null", *few)  # another folder, so another run
    assert command.inside("fit", *other, config=folder / "config.yaml") == 0
    assert os.readlink(command.folder / "other/checkpoints/last") == "step_00000006.ckpt"
    assert list(command.metrics("other")) == list(rows)
    assert command.metrics(folder) == rows

    command.run("fit", f"output_dir={output_dir}", "overwrite=true", "trainer.max_steps=2",
            "callbacks=minimal")  # fmt: skip
    assert list(command.metrics(folder)) == [1, 2]
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1


def test_recompute_changes_nothing_but_memory(command):
    """All instruments watch: rebuilt streams are no passes of their own."""
    few = ("callbacks.stream_matrices=null", "callbacks.dashboard=null")  # which take longest
    tables = []
    for setting in ("off", "auto", "3"):
        words = (f"output_dir={setting}", f"recompute={setting}", "trainer.max_steps=2", *few)
        assert command.inside("fit", *words) == 0
        config = yaml.safe_load((command.folder / setting / "config.yaml").read_text())
        assert config["recompute"] == (3 if setting == "3" else setting)
        tables.append(command.metrics(command.folder / setting))
    assert tables[0] == tables[1] == tables[2]
    assert {"amax_gain/composite/backward", "stream_diversity/mean"} <= set(tables[0][1])


def wait_for_step(folder, step, process, seconds=120):
    """Wait until metrics.csv has a row for `step`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        file = folder / "metrics.csv"
        if file.exists() and any(
            line.startswith(f"{step},") for line in file.read_text().splitlines()
        ):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


@pytest.mark.slow
def test_sigterm_to_the_whole_group_saves_and_resumes_bit_for_bit(command, long_run, uninterrupted):
    # Stopped before the end of the first pass over the data, finished after it.
    folder = command.folder / "run"
    process = command.start("fit", "output_dir=run", *long_run)
    wait_for_step(folder, 13, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    stopped = max(command.metrics(folder))
    assert os.readlink(folder / "checkpoints/last") == f"step_{stopped:08d}.ckpt"
    command.run("fit", "output_dir=run", "ckpt_path=last", *long_run)
    assert command.metrics(folder) == uninterrupted
    points = command.points("train/loss")
    assert [step for step, _ in points] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.0, 0.013, 0.031])
def test_kill_9_at_any_moment_resumes_bit_for_bit(command, long_run, uninterrupted, wait):
    folder = command.folder / "run"
    often = [*long_run, "checkpoint.every_n_steps=1"]
    process = command.start("fit", "output_dir=run", *often)
    wait_for_step(folder, 11, process)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    last = (folder / "checkpoints/last").resolve()
    assert torch.load(last, weights_only=False)["global_step"] >= 9
    # The newest is damaged on top of it: the one before has to do.
    last.write_bytes(last.read_bytes()[:1000])
    _, errors = command.run("fit", "output_dir=run", "ckpt_path=last", *often)
    assert f"warning: {last.name} is not a complete checkpoint" in errors
    assert command.metrics(folder) == uninterrupted
    assert not list((folder / "checkpoints").glob(".aside*"))


def test_resume_across_the_end_of_the_data_is_bit_for_bit(command):
    # From a checkpoint in the first pass over the data into the second, with another folder.
    settings = ["callbacks=minimal", "data.num_workers=2", "trainer.max_steps=28",
                "checkpoint.every_n_steps=22", "trainer.val_check_interval=11"]  # fmt: skip
    command.run("fit", "output_dir=whole", *settings)
    whole = command.metrics("whole")
    checkpoint = command.folder / "whole/checkpoints/step_00000022.ckpt"
    command.run("fit", "output_dir=rest", f"ckpt_path={checkpoint}", *settings)
    rest = command.metrics("rest")
    assert list(rest) == list(range(23, 29))
    assert rest == {step: row for step, row in whole.items() if step > 22}


def test_nonfinite_loss_stops_with_what_to_try(command):
    # A learning rate that no step survives.
    words = ("optimizer.lr=1e38", "optimizer.warmup_steps=0", "trainer.gradient_clip_val=null",
             "trainer.max_steps=20", "checkpoint.every_n_steps=1")  # fmt: skip
    _, errors = command.run("fit", "output_dir=run", *words, code=3)
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and "at step" in last and "optimizer.lr" in last
    assert "Traceback" not in errors
    ended = json.loads((command.folder / "run/environment.json").read_text())["ended"]
    assert ended["non_finite"] and ended["reason"] in last
    for file in (command.folder / "run/checkpoints").glob("step_*.ckpt"):
        saved = torch.load(file, weights_only=False)["state_dict"]
        assert all(bool(value.isfinite().all()) for value in saved.values())


def test_a_checkpoint_of_another_shape_or_a_cut_one_is_refused(command):
    command.run("fit", "output_dir=run", "trainer.max_steps=2", "callbacks=minimal")
    _, errors = command.run("fit", "output_dir=run", "ckpt_path=last", "model.dim=24", code=2)
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and "model.embedding.weight" in last
    assert "[257, 16]" in last and "[257, 24]" in last
    file = command.folder / "run/checkpoints/step_00000002.ckpt"
    file.write_bytes(file.read_bytes()[:-100])
    _, errors = command.run("validate", "output_dir=run", f"ckpt_path={file}", code=2)
    assert errors.splitlines()[-1].startswith(f"error: checkpoint {file} is not a complete")
    assert "Traceback" not in errors


def test_an_alarm_is_one_setting(command, capfd):
    """With a limit that every step breaks: what it did stands in the table and on the screen."""
    actions = "callbacks.stability_alarm.actions=[checkpoint, skip_update, lower_lr]"
    words = ("output_dir=run", "callbacks=alarm", actions, "trainer.max_steps=4")
    limits = ("callbacks.stability_alarm.loss_limit=0.5", "callbacks.stability_alarm.max_skips=2")
    assert command.inside("fit", *words, *limits, "checkpoint.every_n_steps=4") == 0
    said = [line for line in capfd.readouterr()[1].splitlines() if line.startswith("alarm: ")]
    assert ["step 1:" in said[0], "step 2:" in said[1], len(said)] == [True, True, 2]
    assert "train/loss 5." in said[0] and "above the limit 0.5" in said[0]
    assert "update skipped, learning rate times 0.5" in said[0]
    rows = command.metrics()
    assert [row.get("alarm/skipped_updates") for row in rows.values()] == ["1.0", "2.0", None, None]
    assert rows[1]["alarm/train/loss"] == rows[1]["train/loss"]
    assert command.points("alarm/train/loss/bound") == [(1, 0.5), (2, 0.5)]
    names = sorted(os.listdir(command.folder / "run/checkpoints"))
    assert names == ["last", "step_00000001.ckpt", "step_00000004.ckpt"]
    assert command.inside("fit", *words, "callbacks.stability_alarm.patience=0",
                          "overwrite=true") == 2  # fmt: skip
    assert "patience is 0" in capfd.readouterr()[1].splitlines()[-1]


@pytest.mark.slow
def test_two_processes_share_the_data_and_one_writes(command):
    command.run("fit", "output_dir=one", "callbacks=minimal")
    command("fit", "output_dir=two", "callbacks=minimal", "strategy=ddp", "trainer.devices=2",
            "data.micro_batch_size=1")  # fmt: skip
    assert sorted(os.listdir(command.folder / "two/checkpoints")) == [
        "last",
        "step_00000004.ckpt",
        "step_00000006.ckpt",
    ]
    one, two = (command.metrics(name) for name in ("one", "two"))
    assert list(one) == list(two)
    for step, row in one.items():  # the same sequences per step, summed in another order
        for tag in ("train/loss", "val/loss"):
            if tag in row:
                assert float(two[step][tag]) == pytest.approx(float(row[tag]), rel=1e-5)
