"""Robust bands: bounds, rounding, lasting levels, limits and values that are not finite."""

import math
import random

import numpy as np
import pytest

from mhc_lightning.callbacks.alarm.robust_band import RobustBand
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


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: band(window=7), "window"),
        (lambda: band(deviations=-1), "deviations"),
        (lambda: band(rise=math.nan), "rise"),
    ],
)
def test_settings_out_of_range_are_refused(make, word):
    with pytest.raises(UserError, match=word):
        make()
