"""How figures look: colours that fit light and dark pages, axes, labels beside their lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mhc_lightning.reporting.series import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Name, on light and on dark ground. The light ones are drawn; on the page the name is a variable.
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
INK, FAINT, GRID = (COLOURS[name][0] for name in ("ink", "faint", "grid"))
RUN_COLOURS = [light for name, (light, _) in COLOURS.items() if name.startswith("run-")]
DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]

_SIZE = (4.5, 3.1)  # inches
PLACE = (0.125, 0.15, 0.70, 0.665)  # of the axes: left, bottom, width, height
TEXT = 9.0
_MOST_POINTS = 800


@dataclass(frozen=True)
class Look:
    """How a run is drawn.

    Attributes:
        label: What stands beside its lines.
        colour: One of `COLOURS`, by name.
        dash: Matplotlib's line style.
    """

    label: str
    colour: str
    dash: Any = "-"

    @property
    def ink(self) -> str:
        """The colour on light ground."""
        return COLOURS[self.colour][0]


def panel(title: str, across: str, up: str) -> "tuple[Figure, Axes]":
    """A figure with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, facecolor="none")
    axes = figure.add_axes(PLACE)
    axes.set_facecolor("none")
    figure.text(0.02, 0.985, title, fontsize=10.5, color=INK, weight="bold", va="top")
    figure.text(0.02, 0.905, up, fontsize=8.3, color=FAINT, va="top")
    axes.set_xlabel(across, fontsize=TEXT, color=FAINT, labelpad=3)
    axes.tick_params(length=0, labelsize=TEXT - 0.5, labelcolor=FAINT, pad=4)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=FAINT, linewidth=0.8)
    return figure, axes


def reference(axes: "Axes", value: float) -> None:
    """A dashed line across, at a value to compare with."""
    axes.axhline(value, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)


def thinned(series: Series) -> Series:
    """At most some hundred points: the lowest and the highest of each stretch."""
    if len(series) <= _MOST_POINTS:
        return series
    kept = set()
    for part in np.array_split(np.arange(len(series)), _MOST_POINTS // 2):
        values = series.values[part]
        kept |= {int(part[values.argmin()]), int(part[values.argmax()])}
    index = np.array(sorted(kept))
    return Series(series.steps[index], series.values[index])


def line(
    axes: "Axes",
    series: Series,
    look: Look,
    *,
    faint: bool = False,
    marks: bool = False,
    width: float = 1.7,
) -> None:
    """One run's values; a faint line is the unsmoothed one behind the smoothed."""
    shown = thinned(series)
    axes.plot(
        shown.steps,
        shown.values,
        color=look.ink,
        linestyle="-" if faint else look.dash,
        linewidth=0.8 if faint else width,
        alpha=0.3 if faint else 1.0,
        marker="o" if marks else None,
        markersize=3.2 if marks else 0,
        solid_joinstyle="round",
        zorder=2 if faint else 3 - 0.5 * (look.colour == "run-0"),  # the baseline behind others
    )


def names_beside(axes: "Axes", ends: Sequence[tuple[float, Look]]) -> None:
    """Each run's name at the right, at the height of its last value, none over another.

    The axes become as narrow as the names need.
    """
    figure = axes.get_figure()
    assert figure is not None
    low, high = axes.get_ylim()
    logarithmic = axes.get_yscale() == "log"

    def height(value: float) -> float:
        if logarithmic:
            value, bottom, top = (np.log(max(v, 1e-300)) for v in (value, low, high))
        else:
            bottom, top = low, high
        return float(np.clip((value - bottom) / (top - bottom), 0.0, 1.0))

    placed = sorted(((height(value), look) for value, look in ends), key=lambda pair: pair[0])
    room = min(0.068, 1.0 / max(len(placed) - 1, 1))
    heights = [h for h, _ in placed]
    for k in range(1, len(heights)):  # push up, then back down from the top
        heights[k] = max(heights[k], heights[k - 1] + room)
    ceiling = 1.02
    for k in reversed(range(len(heights))):
        heights[k] = min(heights[k], ceiling)
        ceiling = heights[k] - room
    size = TEXT if room > 0.06 else max(5.0, 130 * room)
    labels = [_short(look.label) for _, look in placed]
    left, bottom, width, tall = PLACE
    needed = (max(map(len, labels)) * 0.58 * size + 9) / (72 * _SIZE[0])  # of the figure's width
    width = min(width, 0.99 - left - needed)
    axes.set_position((left, bottom, width, tall))
    for h, label, (_, look) in zip(heights, labels, placed, strict=True):
        axes.text(
            1 + 0.018 / width, h, label, transform=axes.transAxes, fontsize=size,
            color=look.ink, va="center", ha="left",
        )  # fmt: skip


def _short(label: str) -> str:
    """At most 18 characters: where it begins and where it ends."""
    return label if len(label) <= 18 else f"{label[:8]}…{label[-9:]}"


def whole_numbers(axes: "Axes") -> None:
    """Steps and sub-layers: no fractions, thousands told apart."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def fit_height(axes: "Axes", values: np.ndarray, *, around: float | None = None) -> None:
    """Vertical limits for values that are shown.

    Args:
        axes: The axes.
        values: What has to fit.
        around: A value that has to fit, too. Where values are positive and spread over more than
            a factor of 5, the axis becomes logarithmic.
    """
    shown = values[np.isfinite(values)]
    if around is not None:
        shown = np.append(shown, around)
    if len(shown) == 0:
        return
    low, high = float(shown.min()), float(shown.max())
    if low > 0 and high / low > 5:
        logarithmic(axes, low, high)
        return
    margin = 0.08 * (high - low) or max(0.02 * abs(high), 1e-3)
    axes.set_ylim(low - margin, high + margin)
    _plain_numbers(axes)


def logarithmic(axes: "Axes", low: float, high: float) -> None:
    """A logarithmic axis from `low` to `high`, both positive."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_ylim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
    spread = high / low
    subs = (1.0, 2.0, 5.0) if spread < 200 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7 if spread >= 200 else 12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def _plain_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def tick(value: float) -> str:
    """A number beside an axis: 0.02, 1,000, 1e−6."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e5):
        text = f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    else:
        text = f"{round(value, 6):,g}"
    return text.replace("-", "−")
