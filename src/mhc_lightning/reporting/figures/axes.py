"""Axes of the report's figures: a titled pair of axes, lines of runs, names beside the lines."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mhc_lightning.plotting.theme import FAINT, INK, TEXT, style_axes
from mhc_lightning.reporting.figures.run_styles import RunStyle
from mhc_lightning.reporting.metric_series import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (4.5, 3.1)  # inches
AXES_BOX = (0.125, 0.15, 0.70, 0.665)  # left, bottom, width, height; shares of the figure
_MAX_POINTS = 800


def new_axes(title: str, xlabel: str, ylabel: str) -> "tuple[Figure, Axes]":
    """A transparent figure with one pair of axes; `ylabel` stands below the title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, facecolor="none")
    axes = figure.add_axes(AXES_BOX)
    axes.set_facecolor("none")
    figure.text(0.02, 0.985, title, fontsize=10.5, color=INK, weight="bold", va="top")
    figure.text(0.02, 0.905, ylabel, fontsize=8.3, color=FAINT, va="top")
    axes.set_xlabel(xlabel, fontsize=TEXT, color=FAINT, labelpad=3)
    style_axes(axes)
    axes.tick_params(pad=4)
    return figure, axes


def thin_out(series: Series) -> Series:
    """At most 800 points of a series: the lowest and the highest of each stretch."""
    if len(series) <= _MAX_POINTS:
        return series
    chosen = set()
    for part in np.array_split(np.arange(len(series)), _MAX_POINTS // 2):
        values = series.values[part]
        chosen |= {int(part[values.argmin()]), int(part[values.argmax()])}
    index = np.array(sorted(chosen))
    return Series(series.steps[index], series.values[index])


def draw_line(
    axes: "Axes",
    series: Series,
    style: RunStyle,
    *,
    faint: bool = False,
    marks: bool = False,
    width: float = 1.7,
) -> None:
    """Draw one run's values; `faint` draws the raw values behind a smoothed line."""
    shown = thin_out(series)
    axes.plot(
        shown.steps,
        shown.values,
        color=style.ink,
        linestyle="-" if faint else style.dash,
        linewidth=0.8 if faint else width,
        alpha=0.3 if faint else 1.0,
        marker="o" if marks else None,
        markersize=3.2 if marks else 0,
        solid_joinstyle="round",
        zorder=2 if faint else 3 - 0.5 * (style.colour == "run-0"),  # the baseline behind others
    )


def label_lines(axes: "Axes", ends: Sequence[tuple[float, RunStyle]]) -> None:
    """Write each run's name to the right of the axes, at the height of its last value.

    Names that would overlap are moved apart, and the axes become as narrow as the names need.

    Args:
        axes: Axes whose limits are set.
        ends: Last value and style of each line.
    """
    by_height = sorted(((_height(axes, value), style) for value, style in ends), key=lambda p: p[0])
    line_height = min(0.068, 1.0 / max(len(by_height) - 1, 1))
    heights = [height for height, _ in by_height]
    for k in range(1, len(heights)):  # push up, then back down from the top
        heights[k] = max(heights[k], heights[k - 1] + line_height)
    ceiling = 1.02
    for k in reversed(range(len(heights))):
        heights[k] = min(heights[k], ceiling)
        ceiling = heights[k] - line_height
    size = TEXT if line_height > 0.06 else max(5.0, 130 * line_height)
    labels = [_short(style.label) for _, style in by_height]
    left, bottom, width, height = AXES_BOX
    label_width = (max(map(len, labels)) * 0.58 * size + 9) / (72 * _SIZE[0])
    width = min(width, 0.99 - left - label_width)
    axes.set_position((left, bottom, width, height))
    for y, label, (_, style) in zip(heights, labels, by_height, strict=True):
        axes.text(
            1 + 0.018 / width, y, label, transform=axes.transAxes, fontsize=size,
            color=style.ink, va="center", ha="left",
        )  # fmt: skip


def _height(axes: "Axes", value: float) -> float:
    """The height of a value within the axes, from 0 to 1."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        value, low, high = (float(np.log(max(v, 1e-300))) for v in (value, low, high))
    return float(np.clip((value - low) / (high - low), 0.0, 1.0))


def _short(label: str) -> str:
    """At most 18 characters of a name: its beginning and its end."""
    return label if len(label) <= 18 else f"{label[:8]}…{label[-9:]}"
