"""A number by sub-layer and step, as colours around 1."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mhc_lightning.reporting.drawing import FAINT, PLACE, TEXT, panel, tick, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_COLUMNS = 240
# Below 1 blue, above 1 orange, both readable on light and on dark; 1 itself is transparent.
_BELOW, _ABOVE = (0.22, 0.52, 0.80), (0.88, 0.38, 0.10)


def heat_map(
    layers: Sequence[int],
    steps: np.ndarray,
    values: np.ndarray,
    limit: float,
    title: str,
) -> "Figure":
    """A gain by sub-layer (up) and step (across), coloured by how far from 1 it is, either way.

    Args:
        layers: Sub-layers [L].
        steps: Steps [T].
        values: Gains [L, T]; NaN where there is none.
        limit: The gain, above 1, at which colours end (below 1: its inverse).
        title: Above it.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = panel(title, "step", "sub-layer")
    axes.grid(visible=False)
    columns = min(_MOST_COLUMNS, len(steps))
    edges = np.linspace(0, steps[-1], columns + 1)[1:]
    # Of the samples within a column the one farthest from 1; without any, the next one.
    scaled = _distance(values, limit)
    grid = np.full((len(layers), columns), np.nan)
    place = np.searchsorted(edges, steps)
    for column in range(columns):
        inside = np.flatnonzero(place == column)
        if len(inside) == 0:
            inside = np.array([min(np.searchsorted(steps, edges[column]), len(steps) - 1)])
        part = np.where(np.isnan(scaled[:, inside]), 0.0, scaled[:, inside])
        grid[:, column] = np.take_along_axis(part, np.abs(part).argmax(1)[:, None], 1)[:, 0]
    extent = (0, float(max(steps[-1], 1)), layers[0] - 0.5, layers[-1] + 0.5)
    axes.imshow(_colours(grid), extent=extent, origin="lower", aspect="auto", interpolation="none")
    whole_numbers(axes)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.spines["left"].set(visible=True, color=FAINT, linewidth=0.8)
    _scale_beside(figure, limit)
    return figure


def _distance(values: np.ndarray, limit: float) -> np.ndarray:
    """Gains to -1 … 1, by their logarithm; beyond the limit, and what is not finite, is cut."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.log(values) / np.log(limit), -1.0, 1.0)


def _colours(scaled: np.ndarray) -> np.ndarray:
    colour = np.where(scaled[..., None] < 0, _BELOW, _ABOVE)
    opacity = np.abs(scaled[..., None]) ** 0.7
    return np.concatenate([colour, np.nan_to_num(opacity)], axis=-1)


def _scale_beside(figure: "Figure", limit: float) -> None:
    axes = figure.add_axes((0.86, PLACE[1], 0.025, PLACE[3]))
    axes.set_facecolor("none")
    ramp = np.linspace(-1, 1, 101)[:, None]
    axes.imshow(_colours(ramp), extent=(0, 1, -1, 1), origin="lower", aspect="auto",
                interpolation="none")  # fmt: skip
    axes.set_xticks([])
    axes.yaxis.tick_right()
    halfway = limit**0.5
    marks = [1 / limit, 1 / halfway, 1.0, halfway, limit]
    axes.set_yticks([-1, -0.5, 0, 0.5, 1], [tick(float(f"{m:.2g}")) for m in marks])
    axes.tick_params(length=0, labelsize=TEXT - 1, labelcolor=FAINT, pad=3)
    for spine in axes.spines.values():
        spine.set(color=FAINT, linewidth=0.6)
