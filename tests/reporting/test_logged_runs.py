"""Logged runs: folders found, names told apart, tables and settings read as written."""

import pytest

from mhc_lightning.errors import UserError
from mhc_lightning.reporting import run_description
from mhc_lightning.reporting.logged_runs import read_runs


def test_a_folder_of_runs_is_searched_and_each_run_read_once(runs):
    found = read_runs([str(runs / "mhc"), str(runs), f"{runs}/hc/"])
    assert [run.name for run in found] == ["mhc", "foreign", "hc", "residual"]
    killed, foreign, *_ = found
    assert killed.last_step == 800, "a line that was cut is no row"
    assert killed.setting("data.path") == "data/${mine}", "escaped interpolations are undone"
    assert foreign.config is None and foreign.environment is None
    assert (
        run_description.connection_name(foreign) is None
        and run_description.planned_steps(foreign) is None
    )
    assert {run_description.UNKNOWN} == set(run_description.describe_run(foreign).values())


def test_the_table_counts_and_event_files_add_what_it_lacks(tmp_path, write):
    write.events(tmp_path, {"train/loss": {1: 9.0}, "other": {1: 2.0}})
    write.table(tmp_path, {"train/loss": {1: 0.1}, "epoch": {1: 0}, "name": {1: "text"}})
    (run,) = read_runs([str(tmp_path)])
    assert {tag: s.values.tolist() for tag, s in run.scalars.items()} == {
        "train/loss": [0.1], "other": [2.0], "epoch": [0.0],
    }  # fmt: skip


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, write):
    for place in ("a/version_0", "b/version_0", "b/version_1"):
        write.table(tmp_path / place, {"train/loss": {1: 1.0}})
    names = [run.name for run in read_runs([str(tmp_path)])]
    assert names == ["a/version_0", "b/version_0", "version_1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "is not there"),
        (lambda folder: _text(folder / "file"), "is a file"),
        (lambda folder: folder, "holds no metrics"),
        (lambda folder: _text(folder / "metrics.csv", "step,train/loss\n").parent, "nothing is"),
        (lambda folder: _text(folder / "metrics.csv", "a,b\n1,2\n").parent, "nothing is"),
    ],
)
def test_what_is_no_run_is_a_user_error(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        read_runs([str(make(tmp_path))])


def _text(file, text="x"):
    file.write_text(text)
    return file


def test_checkpoints_that_are_folders_are_seen_as_files_are(tmp_path, write):
    """Names follow the rule that writing and resuming go by; what only looks like it does not."""
    write.events(tmp_path, {"train/loss": {10: 1.0, 20: 0.5}})
    folder = tmp_path / "checkpoints"
    for name in ("step_00000100", "step_00000200.ckpt", "step_00000300", ".aside-step_00000400",
                 "step_x", "step_00000500.ckpt.tmp"):  # fmt: skip
        (folder / name).mkdir(parents=True)
    for name in ("step_00000050.ckpt", "step_00000300.ckpt", "step_00000600", "steps.ckpt"):
        (folder / name).touch()
    (run,) = read_runs([str(tmp_path)])
    assert run.saved_steps == (50, 100, 300)
    assert run.last_step == 300
