"""Every n-th step: intervals, accumulation, resuming, and the ends of a run."""

from types import SimpleNamespace
from typing import Any

import pytest

from mhc_lightning.callbacks.every_n_steps import EveryNSteps
from mhc_lightning.errors import UserError


def trainer(log_every_n_steps: int = 10, max_steps: int = -1) -> Any:
    return SimpleNamespace(log_every_n_steps=log_every_n_steps, max_steps=max_steps)


def due(schedule: EveryNSteps, owner: Any, steps: Any) -> list[int]:
    return [step for step in steps if schedule.is_due(owner, step)]


def test_follows_the_trainers_logging_interval() -> None:
    assert due(EveryNSteps(None, "x"), trainer(10), range(1, 31)) == [10, 20, 30]
    assert due(EveryNSteps(None, "x", log_intervals=2), trainer(10), range(1, 41)) == [20, 40]
    assert due(EveryNSteps(7, "x"), trainer(10), range(1, 15)) == [7, 14]


def test_a_trainer_that_logs_nothing_makes_no_step_due() -> None:
    assert due(EveryNSteps(None, "x"), trainer(0), range(1, 31)) == []


def test_each_step_is_due_once() -> None:
    assert due(EveryNSteps(2, "x"), trainer(), [1, 1, 2, 2, 2, 3, 4, 4]) == [2, 4]


def test_a_multiple_that_was_jumped_over_is_made_up_for() -> None:
    assert due(EveryNSteps(4, "x"), trainer(), range(1, 20, 2)) == [5, 9, 13, 17]


def test_resuming_does_not_repeat_the_last_step() -> None:
    schedule = EveryNSteps(5, "x")
    schedule.restart(7)
    assert due(schedule, trainer(), range(8, 16)) == [10, 15]


def test_the_ends_of_a_run_if_asked_for() -> None:
    assert due(EveryNSteps(5, "x"), trainer(max_steps=8), range(1, 9)) == [5]
    assert due(EveryNSteps(5, "x", ends=True), trainer(max_steps=8), range(1, 9)) == [5, 8]
    seldom = EveryNSteps(None, "x", log_intervals=10, ends=True)
    assert due(seldom, trainer(4, max_steps=98), range(1, 99)) == [4, 40, 80, 98]
    seldom.restart(50)
    assert due(seldom, trainer(4, max_steps=98), range(51, 99)) == [52, 80, 98]


def test_a_wrong_interval_names_its_owner() -> None:
    with pytest.raises(UserError, match=r"Somebody: every_n_steps is 'often'"):
        EveryNSteps("often", "Somebody")  # type: ignore[arg-type]
