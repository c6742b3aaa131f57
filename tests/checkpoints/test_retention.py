"""Which checkpoints may be deleted, and what a killed run leaves."""

import shutil
from pathlib import Path

import pytest

from mhc_lightning.checkpoints.names import saved_steps
from mhc_lightning.checkpoints.retention import Retention, remove_leftovers


def test_leftovers_of_a_file_are_removed(tmp_path):
    (tmp_path / ".aside-step_00000010.ckpt").write_bytes(b"half")
    (tmp_path / "step_00000005.ckpt").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["step_00000005.ckpt"]


def test_leftovers_of_a_folder_are_removed(tmp_path, saved):
    shutil.copytree(saved, tmp_path / f".aside-{saved.name}")
    (tmp_path / ".aside-last").symlink_to(saved.name)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def retention(keep_best: int = 2, monitor: str = "val/loss", mode: str = "min") -> Retention:
    return Retention(1, 4, keep_best, monitor, mode)


@pytest.mark.parametrize(("mode", "best"), [("min", [3, 1]), ("max", [2, 1])])
def test_the_best_are_ordered_by_score_and_equal_ones_by_step(mode: str, best: list[int]) -> None:
    kept = retention(mode=mode)
    admitted = [kept.admit(step, score) for step, score in enumerate([2.0, 9.0, 1.0, 2.0], 1)]
    assert kept.best_steps() == best and admitted == [True, True, mode == "min", False]
    assert not kept.admit(5, float("nan")) and kept.best_steps() == best


def test_a_step_that_could_not_be_saved_gives_its_place_back() -> None:
    kept = retention()
    for step, score in enumerate([3.0, 2.0, 1.0], 1):
        kept.admit(step, score)
    assert kept.best_steps() == [3, 2]
    kept.withdraw(3)
    assert kept.best_steps() == [2, 1]


def test_all_but_the_newest_the_round_and_the_spared_are_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 4, 5, 6, 9):
        (tmp_path / f"step_{step:08d}.ckpt").touch()
    retention().prune(tmp_path, newest=6, spared={2})
    assert saved_steps(tmp_path) == [2, 4, 6, 9], "9 is of an abandoned branch"


@pytest.mark.parametrize("change", [{"monitor": "accuracy"}, {"mode": "max"}])
def test_scores_by_another_metric_or_mode_are_kept_and_not_compared(change: dict) -> None:
    before = retention()
    before.admit(5, 1.0)
    before.admit(6, 2.0)
    before.kept = {3, 4}
    same, other = retention(), retention(**change)
    same.load_state_dict(before.state_dict(), {3, 5})
    assert (same.scores, same.kept) == ({5: 1.0}, {3}), "as far as they exist"
    with pytest.warns(UserWarning, match=r"chosen anew; those so far \(\[5\]\) are kept"):
        other.load_state_dict(before.state_dict(), {3, 5})
    assert (other.scores, other.kept) == ({}, {3, 5})
