"""The statistics of an alarm, and what it decides from them."""

import math
import random

import numpy as np
import pytest

from mhc_lightning.callbacks.alarm.policy import AlarmPolicy
from mhc_lightning.callbacks.alarm.robust_band import RobustBand
from mhc_lightning.callbacks.alarm.update_control import LoweredRate
from mhc_lightning.errors import UserError


def band(**changes):
    settings = {"window": 16, "least": 8, "deviations": 6.0, "rise": 0.1, "limit": None}
    return RobustBand("x", **{**settings, **changes})


def filled(values, **changes):
    judge = band(**changes)
    assert [judge.judge(value) for value in values] == [None] * len(values)
    return judge


def test_the_bound_is_the_median_and_so_many_deviations():
    values = [random.gauss(5, 1) for _ in range(16)]
    median = np.median(values)
    sigma = 1.4826 * np.median(np.abs(np.array(values) - median))
    bound = median + 6 * sigma
    assert filled(values).judge(bound - 1e-9) is None
    breach = filled(values).judge(bound + 1e-9)
    assert breach.bound == pytest.approx(bound) and breach.seen == 16
    assert (breach.median, breach.deviation) == pytest.approx((median, sigma))
    assert "x 1" not in str(breach) and f"above {bound:.4g} (the last 16: median" in str(breach)


@pytest.mark.parametrize("level", [1.0, -3.0, 1e-8, 1e8])
def test_a_flat_series_does_not_trip_over_rounding_nor_over_the_rise(level):
    judge = filled([level * (1 + 1e-7 * (k % 2)) for k in range(16)])
    assert judge.judge(level + 0.099 * abs(level)) is None
    assert judge.judge(level + 0.101 * abs(level)) is not None
    assert filled([0.0] * 16).judge(1e-30) is not None  # zero has no scale: its band is 0
    assert filled([level] * 16).judge(level - 100 * abs(level)) is None  # falling is no explosion


def test_outliers_do_not_move_the_band_but_a_level_that_lasts_becomes_it():
    judge = filled([random.gauss(1, 0.01) for _ in range(16)])
    assert all(judge.judge(50.0) for _ in range(8))  # half a window
    judge.judge(50.0)
    assert judge.judge(50.0) is None
    assert judge.judge(1.0) is None


def test_nothing_is_judged_before_there_are_enough_values_but_for_limits():
    assert all(band().judge(value) is None for value in [1.0] * 7 + [99.0])
    judge = band(limit=10.0)
    assert judge.judge(10.0) is None
    assert str(judge.judge(10.5)) == "x 10.5 above the limit 10"
    calm = filled([100.0] * 16)
    calm.limit = 50.0  # below the band: it decides
    assert calm.judge(60.0).median is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_breach_from_the_first_value_on_and_joins_no_band(value):
    for judge in (band(), filled([1.0] * 16), band(limit=3.0)):
        before = list(judge.values)
        breach = judge.judge(value)
        assert breach is not None and str(breach) == f"x {value} is not finite"
        assert list(judge.values) == before
        assert judge.judge(1.0) is None


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


def test_a_rate_is_lowered_and_comes_back():
    rate = LoweredRate(0.5, 10)
    assert rate.scale(1) == rate.scale(100) == 1.0
    rate.lower(100)
    assert [rate.scale(s) for s in (100, 101, 105, 110, 500)] == [0.5, 0.55, 0.75, 1.0, 1.0]
    rate.lower(105)  # from where it is
    assert rate.scale(105) == 0.375
    for step in range(106, 130):
        rate.lower(step)
    assert rate.scale(129) == pytest.approx(0.1)  # not into nothing
    stays = LoweredRate(0.5, None)
    stays.lower(3)
    assert stays.scale(10**6) == 0.5


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: band(window=7), "window"),
        (lambda: band(deviations=-1), "deviations"),
        (lambda: band(rise=math.nan), "rise"),
        (lambda: policy("warm"), "'warm'"),
        (lambda: policy(), "nothing"),
        (lambda: policy("warn", patience=0), "patience"),
        (lambda: policy("warn", cooldown=-1), "cooldown"),
        (lambda: policy("warn", max_skips=0), "max_skips"),
        (lambda: LoweredRate(1.0, 10), "lr_factor"),
        (lambda: LoweredRate(0.5, 0), "lr_recovery_steps"),
    ],
)
def test_settings_out_of_range_are_refused(make, word):
    with pytest.raises(UserError, match=word):
        make()
