"""Where an Amax gain was largest and smallest: value, step and sub-layers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mhc_lightning.reporting.metric_series import Series, layer_matrix

KINDS = ("composite", "single")
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Extreme:
    """An extreme of a gain over sub-layers and steps.

    Attributes:
        value: The gain.
        step: When.
        first_layer: Of the neighbouring sub-layers that share it (from 0); None where gains are
            not logged by sub-layer.
        last_layer: Of these.
    """

    value: float
    step: int
    first_layer: int | None
    last_layer: int | None


@dataclass(frozen=True)
class GainRange:
    """A gain over a whole run.

    Attributes:
        largest: The largest value; one that is NaN or infinite is larger than every number.
        smallest: The smallest over sub-layers; None where gains are not logged by sub-layer.
        left: The first step at which it exceeded `limit`; None where it never did.
        distance: The largest distance from 1 of any value.
    """

    largest: Extreme
    smallest: Extreme | None
    left: int | None
    distance: float


def gain_tag(kind: str, direction: str) -> str:
    """``amax_gain/{single,composite}/{forward,backward}``."""
    return f"amax_gain/{kind}/{direction}"


def gains_by_layer(
    scalars: Mapping[str, Series], tag: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """As `layer_matrix`, where a gain that was logged as NaN counts as infinite."""
    return layer_matrix(
        {name: _lost_as_infinite(s) for name, s in scalars.items() if name.startswith(tag)}, tag
    )


def _lost_as_infinite(series: Series) -> Series:
    return Series(series.steps, np.where(np.isnan(series.values), math.inf, series.values))


def gain_range(scalars: Mapping[str, Series], tag: str, limit: float) -> GainRange | None:
    """Extremes of a gain; None where it was not logged.

    Sub-layers belong to the largest (smallest) value where they are its neighbours without a gap
    and have at least half of it (at most twice it) at that step.
    """
    layers, steps, values = gains_by_layer(scalars, tag)
    if not layers:
        overall = scalars.get(tag)
        if overall is None or not len(overall):
            return None
        steps, values = overall.steps, _lost_as_infinite(overall).values[None, :]
    logged = ~np.isnan(values)
    high, low = np.where(logged, values, -math.inf), np.where(logged, values, math.inf)
    row, column = np.unravel_index(int(high.argmax()), high.shape)
    value = float(high[row, column])
    near = high[:, column] >= value / 2
    smallest = None
    if layers:
        i, j = np.unravel_index(int(low.argmin()), low.shape)
        least = float(low[i, j])
        shared = low[:, j] <= 2 * least
        smallest = Extreme(least, int(steps[j]), *_around(layers, shared, int(i)))
    beyond = np.flatnonzero(high.max(0) > limit)
    return GainRange(
        largest=Extreme(value, int(steps[column]), *_around(layers, near, int(row))),
        smallest=smallest,
        left=int(steps[beyond[0]]) if len(beyond) else None,
        distance=float(np.abs(values[logged] - 1).max()),
    )


def _around(layers: list[int], near: np.ndarray, row: int) -> tuple[int | None, int | None]:
    """The stretch of rows that are `near`, around one of them."""
    if not layers:
        return None, None
    first = last = row
    while first > 0 and near[first - 1]:
        first -= 1
    while last < len(layers) - 1 and near[last + 1]:
        last += 1
    return layers[first], layers[last]
