"""Statistics of noisy series: windows, intervals that hold the truth, the lowest mean."""

import numpy as np
import pytest

from mhc_lightning.reporting.metric_series import Series
from mhc_lightning.reporting.statistics import (
    final_mean,
    final_window,
    lowest_mean,
    mean_interval,
    smoothing_width,
    t_quantile,
)


def series(values):
    return Series(np.arange(1, len(values) + 1), np.asarray(values, dtype=float))


def test_the_final_window_is_a_tenth_but_twenty_points_where_there_are_forty():
    assert [final_window(n) for n in (0, 1, 2, 5, 40, 100, 200, 201, 5000)] == [
        0, 1, 1, 2, 20, 20, 20, 21, 500,
    ]  # fmt: skip
    assert [smoothing_width(n) for n in (10, 49, 100, 5000)] == [1, 1, 3, 101]


@pytest.mark.parametrize(("points", "memory"), [(40, 0.0), (100, 0.5), (400, 0.5), (2000, 0.7)])
def test_intervals_of_gaps_hold_the_truth_as_often_as_they_say(points, memory):
    """Paired runs whose own noise is an AR(1) process; what their batches share cancels."""
    generator = np.random.default_rng(5)
    truth, trials, hits, naive = -0.02, 400, 0, 0
    noise = generator.normal(0, 0.05, (points + 50, trials))
    for k in range(1, len(noise)):
        noise[k] += memory * noise[k - 1]
    shared = generator.normal(0, 1.0, points)
    for own in noise[50:].T:
        gap = series(shared + truth + own).minus(series(shared))
        found = final_mean(gap)
        hits += found.low <= truth <= found.high
        window = gap.values[-found.points :]
        half = 1.96 * window.std(ddof=1) / len(window) ** 0.5
        naive += abs(window.mean() - truth) <= half
    assert 0.91 * trials <= hits <= 0.985 * trials
    if memory >= 0.5:
        assert naive < 0.85 * trials, "without regard to memory the interval is too short"


def test_too_few_points_give_no_interval():
    found = final_mean(series(range(14)))
    assert (found.value, found.low, found.high, found.points) == (10.0, None, None, 7)
    assert final_mean(series([])) is None
    assert final_mean(series([np.nan, np.inf])) is None
    lost = final_mean(series([1.0] * 50 + [np.nan]))
    assert (lost.value, lost.last_step) == (1.0, 50)


def test_students_t_and_the_interval_over_seeds():
    assert [round(t_quantile(d), 3) for d in (1, 4, 13, 14, 30, 100, 10**6)] == [
        12.706, 2.776, 2.160, 2.145, 2.042, 1.984, 1.960,
    ]  # fmt: skip
    low, high = mean_interval([-0.03, -0.02, -0.01])
    assert (low, high) == pytest.approx((-0.02 - 0.02484, -0.02 + 0.02484), abs=1e-5)


def test_the_lowest_mean_is_found_where_it_is():
    values = np.full(100, 3.0)
    values[40:60] = 2.0
    assert lowest_mean(series(values)) == (2.0, 41, 60)
