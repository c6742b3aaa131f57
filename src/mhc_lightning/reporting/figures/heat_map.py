"""The heat map of a gain by sub-layer and step: orange above 1, blue below."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mhc_lightning.formatting import format_tick
from mhc_lightning.plotting.theme import FAINT, TEXT, use_whole_numbers
from mhc_lightning.reporting.figures.axes import AXES_BOX, new_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_COLUMNS = 240
# Readable on light and on dark pages; 1 itself is transparent.
_BELOW, _ABOVE = (0.22, 0.52, 0.80), (0.88, 0.38, 0.10)


def heat_map(
    layers: Sequence[int],
    steps: np.ndarray,
    gains: np.ndarray,
    limit: float,
    title: str,
) -> "Figure":
    """Draw a gain by sub-layer (up) and step (across), coloured by its distance from 1.

    Args:
        layers: Sub-layers [L].
        steps: Optimizer steps [T].
        gains: Gains [L, T]; NaN where none was logged.
        limit: The gain, above 1, at which colours end; below 1 they end at its inverse.
        title: The title above it.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_axes(title, "step", "sub-layer")
    axes.grid(visible=False)
    columns = min(_MAX_COLUMNS, len(steps))
    edges = np.linspace(0, steps[-1], columns + 1)[1:]
    # A column shows the sample within it that is farthest from 1, or the next sample.
    distance = _distance(gains, limit)
    grid = np.full((len(layers), columns), np.nan)
    column_of = np.searchsorted(edges, steps)
    for column in range(columns):
        inside = np.flatnonzero(column_of == column)
        if len(inside) == 0:
            inside = np.array([min(np.searchsorted(steps, edges[column]), len(steps) - 1)])
        part = np.where(np.isnan(distance[:, inside]), 0.0, distance[:, inside])
        grid[:, column] = np.take_along_axis(part, np.abs(part).argmax(1)[:, None], 1)[:, 0]
    extent = (0, float(max(steps[-1], 1)), layers[0] - 0.5, layers[-1] + 0.5)
    axes.imshow(_colours(grid), extent=extent, origin="lower", aspect="auto", interpolation="none")
    use_whole_numbers(axes)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.spines["left"].set(visible=True, color=FAINT, linewidth=0.8)
    _draw_scale(figure, limit)
    return figure


def _distance(gains: np.ndarray, limit: float) -> np.ndarray:
    """The logarithm of gains, from -1 at `1 / limit` to 1 at `limit`; clipped beyond them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.log(gains) / np.log(limit), -1.0, 1.0)


def _colours(distance: np.ndarray) -> np.ndarray:
    colour = np.where(distance[..., None] < 0, _BELOW, _ABOVE)
    opacity = np.abs(distance[..., None]) ** 0.7
    return np.concatenate([colour, np.nan_to_num(opacity)], axis=-1)


def _draw_scale(figure: "Figure", limit: float) -> None:
    axes = figure.add_axes((0.86, AXES_BOX[1], 0.025, AXES_BOX[3]))
    axes.set_facecolor("none")
    ramp = np.linspace(-1, 1, 101)[:, None]
    axes.imshow(_colours(ramp), extent=(0, 1, -1, 1), origin="lower", aspect="auto",
                interpolation="none")  # fmt: skip
    axes.set_xticks([])
    axes.yaxis.tick_right()
    halfway = limit**0.5
    marks = [1 / limit, 1 / halfway, 1.0, halfway, limit]
    axes.set_yticks([-1, -0.5, 0, 0.5, 1], [format_tick(float(f"{m:.2g}")) for m in marks])
    axes.tick_params(length=0, labelsize=TEXT - 1, labelcolor=FAINT, pad=3)
    for spine in axes.spines.values():
        spine.set(color=FAINT, linewidth=0.6)
