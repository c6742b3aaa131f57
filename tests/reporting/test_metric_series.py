"""Series of metrics: points sorted and unique, differences, running means, layers as a matrix."""

import numpy as np

from mhc_lightning.reporting.metric_series import Series, layer_matrix


def test_points_are_sorted_and_the_last_of_a_step_counts():
    series = Series.of([3, 1, 3, 2], [30.0, 10.0, 31.0, np.nan])
    assert series.steps.tolist() == [1, 2, 3]
    assert np.array_equal(series.values, [10.0, np.nan, 31.0], equal_nan=True)
    assert series.finite().steps.tolist() == [1, 3]
    assert len(Series.of([], [])) == 0


def test_differences_are_taken_at_common_steps():
    difference = Series.of([1, 2, 4], [1.0, 2.0, 4.0]).minus(Series.of([2, 3, 4], [5.0, 0.0, 1.0]))
    assert (difference.steps.tolist(), difference.values.tolist()) == ([2, 4], [-3.0, 3.0])


def test_running_means_keep_lines_straight_and_ends_in_place():
    line = Series(np.arange(50), np.linspace(0.0, 1.0, 50))
    assert np.allclose(line.smoothed(7).values, line.values)
    bump = Series(np.arange(9), np.eye(9)[4])
    assert np.allclose(bump.smoothed(3).values, np.r_[0, 0, 0, 1, 1, 1, 0, 0, 0] / 3)


def test_layers_logged_at_different_steps_make_one_matrix():
    one = {"gain/layer_10": Series.of([1, 3], [0.1, 0.3]), "gain/layer_2": Series.of([3], [7.0])}
    layers, steps, values = layer_matrix({**one, "gain": one["gain/layer_2"]}, "gain")
    assert (layers, steps.tolist()) == ([2, 10], [1, 3])
    assert np.array_equal(values, [[np.nan, 7.0], [0.1, 0.3]], equal_nan=True)
    assert layer_matrix(one, "other")[0] == []
