"""The theme of every figure: colours for light and dark pages, plain axes, tick labels.

Only matplotlib's object interface is used: no display, no global state of pyplot.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from mhc_lightning.formatting import format_tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "ink": ("#1c2026", "#e8eaed"),
    "faint": ("#667080", "#98a2b3"),
    "grid": ("#e3e6ea", "#2c323a"),
    "run-0": ("#6b7482", "#a4adba"),  # the baseline
    "run-1": ("#0b69b7", "#5aa9e6"),
    "run-2": ("#c8500a", "#f08a4b"),
    "run-3": ("#0a8754", "#3fbf8a"),
    "run-4": ("#8a4fbf", "#b690ea"),
    "run-5": ("#c2377e", "#ef7fb5"),
    "run-6": ("#0e8fa3", "#4cc4d6"),
    "run-7": ("#96690a", "#d3a43b"),
}
"""Colours by name, on a light and on a dark page. Figures are drawn in the light ones."""
INK, FAINT, GRID = (COLOURS[name][0] for name in ("ink", "faint", "grid"))
RUN_COLOURS = [light for name, (light, _) in COLOURS.items() if name.startswith("run-")]
FORWARD, BACKWARD = RUN_COLOURS[1], RUN_COLOURS[2]
DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
TEXT = 9.0
"""Size of text, in points."""


def style_axes(axes: "Axes") -> None:
    """Plain axes: horizontal grid lines, one spine at the bottom, small faint numbers."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=TEXT - 0.5, labelcolor=FAINT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=FAINT, linewidth=0.8)


def draw_reference(axes: "Axes", value: float) -> None:
    """A dashed horizontal line at a value to compare with."""
    axes.axhline(value, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)


def use_whole_numbers(axes: "Axes") -> None:
    """Horizontal ticks for steps and sub-layers: no fractions, thousands separated."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def fit_height(axes: "Axes", values: np.ndarray, *, around: float | None = None) -> None:
    """Set the vertical limits to the finite values, with a margin.

    The axis becomes logarithmic where all values are positive and the largest is more than 5 times
    the smallest.

    Args:
        axes: The axes.
        values: The values that have to fit.
        around: Another value that has to fit. Differences from it of less than 0.2% count as
            rounding: the margin is at least that wide.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shown = values[np.isfinite(values)]
    if around is not None:
        shown = np.append(shown, around)
    if len(shown) == 0:
        return
    low, high = float(shown.min()), float(shown.max())
    if low > 0 and high / low > 5:
        _use_logarithmic_height(axes, low, high)
        return
    margin = 0.08 * (high - low) or max(0.02 * abs(high), 1e-3)
    if around is not None:
        margin = max(margin, 0.002 * abs(around))
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))


def _use_logarithmic_height(axes: "Axes", low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    spread = high / low
    axes.set_yscale("log")
    axes.set_ylim(low / spread**0.06, high * spread**0.06)
    subs = (1.0, 2.0, 5.0) if spread < 200 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7 if spread >= 200 else 12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def drawable(values: np.ndarray) -> np.ndarray:
    """The values that matplotlib can place on an axis; other values become NaN, drawn as a gap."""
    size = np.abs(np.asarray(values, dtype=float))
    return np.where((size < 1e100) & ((size > 1e-100) | (size == 0)), values, np.nan)


def new_picture(width: float, height: float) -> "Figure":
    """A white figure of this size in inches, for drawing and for `to_array`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, facecolor="white")


def to_array(figure: "Figure") -> np.ndarray:
    """Render a figure to a uint8 image [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
