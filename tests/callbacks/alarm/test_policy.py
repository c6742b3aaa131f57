"""Policies: reports and their pauses, skips in a row, patience, and going on from a state."""

import math
import random

import pytest

from mhc_lightning.callbacks.alarm.policy import AlarmPolicy
from mhc_lightning.callbacks.alarm.robust_band import RobustBand
from mhc_lightning.errors import UserError


def policy(*actions, patience=1, cooldown=5, max_skips=2):
    bands = [RobustBand(tag, 16, 8, 6.0, 0.1) for tag in ("loss", "gain")]
    made = AlarmPolicy(actions, bands, patience, cooldown, max_skips)
    for step in range(1, 17):
        assert made.decide(step, {"loss": 1.0, "gain": 1.0}, before_update=True) is None
    return made


def test_a_report_is_followed_by_a_pause_of_that_metric():
    made = policy("warn")
    steps = range(17, 23)
    decisions = [made.decide(s, {"loss": 9.0 * s}, before_update=True) for s in steps]
    assert [s for s, d in zip(steps, decisions, strict=True) if d] == [17, 22]
    assert not any(d.skip or d.checkpoint or d.lower for d in decisions if d)
    assert made.decide(23, {"gain": 9.0}, before_update=False) is not None  # another metric


def test_checkpoints_and_lowering_have_one_pause_in_common():
    made = policy("checkpoint", "lower_lr")
    first = made.decide(17, {"loss": 9.0}, before_update=True)
    assert (first.checkpoint, first.lower, first.skip) == (True, True, False)
    assert made.decide(18, {"gain": 9.0}, before_update=False) is None
    assert made.decide(22, {"loss": 99.0}, before_update=True).lower


def test_so_many_updates_in_a_row_are_skipped_and_then_again_after_a_good_one():
    made = policy("skip_update")
    decisions = [made.decide(17 + k, {"loss": 9.0}, before_update=True) for k in range(4)]
    assert [bool(d and d.skip) for d in decisions] == [True, True, False, False]
    assert made.decide(21, {"loss": 1.0}, before_update=True) is None
    assert made.decide(22, {"loss": math.nan}, before_update=True).skip
    assert made.decide(23, {"gain": 9.0}, before_update=False) is None  # tells of weights


def test_patience_waits_with_all_but_skips():
    made = policy("warn", "checkpoint", "skip_update", patience=3, max_skips=9)
    decisions = [made.decide(17 + k, {"loss": 9.0}, before_update=True) for k in range(3)]
    assert [d.skip for d in decisions] == [True] * 3
    assert [d.checkpoint for d in decisions] == [False, False, True]


def test_a_policy_goes_on_from_its_state():
    straight, saved = policy("warn", "skip_update"), policy("warn", "skip_update")
    for made in (straight, saved):
        made.decide(17, {"loss": 9.0, "gain": 2.0}, before_update=True)
    resumed = policy("warn", "skip_update")
    resumed.load_state_dict(saved.state_dict())
    for step in range(18, 60):
        values = {"loss": random.choice([1.0, 1.05, 9.0]), "gain": random.choice([1.0, 3.0])}
        decisions = [p.decide(step, values, before_update=True) for p in (straight, resumed)]
        assert decisions[0] == decisions[1]
    assert straight.state_dict() == resumed.state_dict()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: policy("warm"), "'warm'"),
        (lambda: policy(), "nothing"),
        (lambda: policy("warn", patience=0), "patience"),
        (lambda: policy("warn", cooldown=-1), "cooldown"),
        (lambda: policy("warn", max_skips=0), "max_skips"),
    ],
)
def test_settings_out_of_range_are_refused(make, word):
    with pytest.raises(UserError, match=word):
        make()
