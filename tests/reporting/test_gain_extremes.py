"""Extremes of gains: value, step and the neighbouring sub-layers that share them."""

import numpy as np
import pytest

from mhc_lightning.reporting.gain_extremes import gain_range
from mhc_lightning.reporting.metric_series import Series


def layered(table, tag="gain"):
    steps = np.arange(1, table.shape[1] + 1)
    found = {f"{tag}/layer_{k}": Series(steps, row) for k, row in enumerate(table)}
    return {**found, tag: Series(steps, table.max(0))}


def test_the_sub_layers_of_an_extreme_are_neighbours_of_like_size():
    table = np.ones((10, 5))
    table[2:5, 3] = [6.0, 11.0, 5.5]
    table[7, 3] = 10.0  # as large, but with a gap between
    table[9, 1] = 0.1
    found = gain_range(layered(table), "gain", 2.0)
    largest, smallest = found.largest, found.smallest
    assert (largest.value, largest.step) == (11.0, 4)
    assert (largest.first_layer, largest.last_layer) == (2, 4)
    assert (smallest.value, smallest.step, smallest.first_layer, smallest.last_layer) == (
        0.1, 2, 9, 9,
    )  # fmt: skip
    assert found.first_above == 4 and found.distance == 10.0


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_a_gain_that_is_no_number_is_larger_than_every_number(lost):
    table = np.ones((4, 5))
    table[1:3, 2] = lost
    found = gain_range(layered(table), "gain", 2.0)
    assert found.largest.value == np.inf and found.first_above == found.largest.step == 3
    assert (found.largest.first_layer, found.largest.last_layer) == (1, 2)
    assert found.smallest.value == 1.0 and found.distance == np.inf


def test_gains_without_sub_layers_name_none():
    found = gain_range({"gain": Series(np.arange(1, 4), np.array([1.0, 5.0, 2.0]))}, "gain", 2.0)
    assert (found.largest.value, found.largest.step, found.largest.first_layer) == (5.0, 2, None)
    assert found.smallest is None
    assert gain_range({"other": Series(np.arange(1), np.ones(1))}, "gain", 2.0) is None
