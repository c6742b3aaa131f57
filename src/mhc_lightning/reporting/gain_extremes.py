"""Extremes of an Amax gain over a run: value, step and sub-layers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mhc_lightning.formatting import format_sub_layers
from mhc_lightning.reporting.metric_series import Series, layer_matrix

KINDS = ("composite", "single")
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Extreme:
    """An extreme of a gain over sub-layers and steps.

    Attributes:
        value: The gain.
        step: The step at which it was logged.
        first_layer: First of the neighbouring sub-layers that share it (from 0); None where gains
            are not logged by sub-layer.
        last_layer: Last of these sub-layers.
    """

    value: float
    step: int
    first_layer: int | None
    last_layer: int | None

    @property
    def sub_layers(self) -> str:
        """Its sub-layers as text; empty where they are not known."""
        return format_sub_layers(self.first_layer, self.last_layer)


@dataclass(frozen=True)
class GainRange:
    """The range of a gain over a whole run.

    Attributes:
        largest: The largest value; NaN and infinity are larger than every number.
        smallest: The smallest over sub-layers; None where gains are not logged by sub-layer.
        first_above: The first step at which it exceeded the limit; None where it never did.
        distance: The largest distance from 1 of any value.
    """

    largest: Extreme
    smallest: Extreme | None
    first_above: int | None
    distance: float


def gain_tag(kind: str, direction: str) -> str:
    """`amax_gain/{single,composite}/{forward,backward}`."""
    return f"amax_gain/{kind}/{direction}"


def gains_by_layer(
    scalars: Mapping[str, Series], tag: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The `layer_matrix` of a gain, in which a logged NaN counts as infinite."""
    return layer_matrix(
        {name: _nan_as_infinite(s) for name, s in scalars.items() if name.startswith(tag)}, tag
    )


def _nan_as_infinite(series: Series) -> Series:
    return Series(series.steps, np.where(np.isnan(series.values), math.inf, series.values))


def gain_range(scalars: Mapping[str, Series], tag: str, limit: float) -> GainRange | None:
    """The extremes of a gain; None where it was not logged.

    A sub-layer shares the largest (smallest) value if it adjoins that value's sub-layer without a
    gap and has at least half (at most twice) the value at that step.
    """
    layers, steps, gains = gains_by_layer(scalars, tag)  # [L], [T], [L, T]
    if not layers:
        overall = scalars.get(tag)
        if overall is None or not len(overall):
            return None
        steps, gains = overall.steps, _nan_as_infinite(overall).values[None, :]
    logged = ~np.isnan(gains)
    high, low = np.where(logged, gains, -math.inf), np.where(logged, gains, math.inf)
    row, column = np.unravel_index(int(high.argmax()), high.shape)
    value = float(high[row, column])
    share = high[:, column] >= value / 2
    largest = Extreme(value, int(steps[column]), *_neighbours(layers, share, int(row)))
    smallest = None
    if layers:
        row, column = np.unravel_index(int(low.argmin()), low.shape)
        value = float(low[row, column])
        share = low[:, column] <= 2 * value
        smallest = Extreme(value, int(steps[column]), *_neighbours(layers, share, int(row)))
    above = np.flatnonzero(high.max(0) > limit)
    return GainRange(
        largest=largest,
        smallest=smallest,
        first_above=int(steps[above[0]]) if len(above) else None,
        distance=float(np.abs(gains[logged] - 1).max()),
    )


def _neighbours(layers: list[int], share: np.ndarray, row: int) -> tuple[int | None, int | None]:
    """First and last sub-layer of the stretch of True around a row."""
    if not layers:
        return None, None
    first = last = row
    while first > 0 and share[first - 1]:
        first -= 1
    while last < len(layers) - 1 and share[last + 1]:
        last += 1
    return layers[first], layers[last]
