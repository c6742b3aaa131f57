"""The figure of the scaling recipes: absolute gap and loss ratio against training FLOPs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from axes import plain, save
from gaps import BASELINE, Line, Point, estimate
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mhc_lightning.plotting.theme import COLOURS, FAINT, INK, RUN_COLOURS, TEXT


@dataclass(frozen=True)
class Curve:
    """One connection in one panel.

    Attributes:
        points: In the order of their FLOPs.
        values: The quantity by seed, of each point.
        line: What was fitted, if anything.
    """

    points: Sequence[Point]
    values: Sequence[Mapping[int, float]]
    line: Line | None


@dataclass(frozen=True)
class Panel:
    """One of the two.

    Attributes:
        title: Above it.
        up: What is measured, with its unit.
        level: Of the baseline.
        curves: By connection.
        baseline: The baseline's points, for the runs of it that diverged.
        logarithmic: FLOPs on a logarithmic axis, and bars for intervals; else a band.
    """

    title: str
    up: str
    level: float
    curves: Mapping[str, Curve]
    baseline: Sequence[Point]
    logarithmic: bool

    @property
    def points(self) -> list[Point]:
        """All of them."""
        return [*self.baseline, *(p for curve in self.curves.values() for p in curve.points)]


def panels(
    points: Sequence[Point],
    lines: Mapping[str, tuple[Line | None, Line | None]],
    logarithmic: bool,
) -> list[Panel]:
    """The two panels of Fig. 6.

    Args:
        points: All of them.
        lines: Through gaps and through ratios, by connection.
        logarithmic: See `Panel`.
    """
    own: dict[str, list[Point]] = {}
    for point in points:
        own.setdefault(point.connection, []).append(point)
    baseline = own.pop(BASELINE)
    pairs = {name: lines.get(name, (None, None)) for name in own}
    gaps = {n: Curve(own[n], [p.gaps for p in own[n]], pairs[n][0]) for n in own}
    ratios = {n: Curve(own[n], [p.ratios for p in own[n]], pairs[n][1]) for n in own}
    return [
        Panel("Loss gap", f"nats per token, minus {BASELINE}", 0.0, gaps, baseline, logarithmic),
        Panel("Loss ratio", f"% of {BASELINE}", 100.0, ratios, baseline, logarithmic),
    ]


def draw(panels: Sequence[Panel], note: str, file: Path) -> None:
    """Draw panels side by side.

    Args:
        panels: From the left.
        note: Below them.
        file: The PNG.
    """
    figure = Figure(figsize=(4.6 * len(panels), 4.0))
    for k, panel in enumerate(panels):
        left = (k + 0.15) / len(panels)
        axes = figure.add_axes((left, 0.27, 0.81 / len(panels), 0.56))
        _fill(axes, panel)
        title, up = panel.title, panel.up
        figure.text(left - 0.05, 0.965, title, fontsize=10.5, color=INK, weight="bold", va="top")
        figure.text(left - 0.05, 0.90, up, fontsize=8.3, color=FAINT, va="top")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.02, 0.04),
        ncol=5, frameon=False, fontsize=TEXT, labelcolor="linecolor", handlelength=1.6,
    )  # fmt: skip
    if panels[0].logarithmic:
        note += " Faint: each seed."
    figure.text(0.03, 0.02, note, fontsize=7.5, color=FAINT, va="bottom")
    save(figure, file)


def _fill(axes: Axes, panel: Panel) -> None:
    axes.axhline(panel.level, color=COLOURS["run-0"][0], linewidth=1.2, label=BASELINE, zorder=1)
    if panel.logarithmic:
        _logarithmic(axes, [point.flops for point in panel.points])
    _marks(axes, panel.baseline, COLOURS["run-0"][0], 0)
    for k, (name, curve) in enumerate(panel.curves.items()):
        again, place = divmod(k, len(RUN_COLOURS) - 1)
        colour, marker = RUN_COLOURS[1 + place], "osD^"[again % 4]
        _curve(axes, name, curve, (colour, marker), panel.logarithmic)
        _marks(axes, curve.points, colour, k + 1)
    axes.set_xlabel("training FLOPs", fontsize=TEXT, color=FAINT, labelpad=3)
    plain(axes)
    axes.margins(x=0.06, y=0.12)
    rows = [panel.baseline, *(curve.points for curve in panel.curves.values())]
    marked = [row for row, points in enumerate(rows, 1) if any(point.diverged for point in points)]
    if marked:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.08 * (1 + marked[-1]) * (high - low))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
    if not panel.logarithmic:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _logarithmic(axes: Axes, flops: Sequence[float]) -> None:
    low, high = min(flops), max(flops)
    margin = max((high / low) ** 0.06, 1.2)  # a single member has no width of its own
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    few, more, most = (1.0,), (1.0, 3.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    subs = few if high / low > 300 else more if high / low > 10 else most
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_minor_locator(NullLocator())


def _curve(axes: Axes, name: str, curve: Curve, look: tuple[str, str], bars: bool) -> None:
    colour, marker = look
    found = [
        (point.flops, value)
        for point, values in zip(curve.points, curve.values, strict=True)
        if (value := estimate(values.values())) is not None
    ]
    across = np.array([flops for flops, _ in found])
    mean = np.array([value.mean for _, value in found])
    # a single seed has no interval
    low = np.array([value.mean if value.low is None else value.low for _, value in found])
    high = np.array([value.mean if value.high is None else value.high for _, value in found])
    if bars:
        pairs = zip(curve.points, curve.values, strict=True)
        single = [(point.flops, value) for point, values in pairs for value in values.values()]
        axes.plot(
            *([flops for flops, _ in single], [value for _, value in single]), marker,
            color=colour, markersize=3, alpha=0.35, markeredgewidth=0,
        )  # fmt: skip
        axes.errorbar(
            *(across, mean, [mean - low, high - mean]), color=colour, fmt=marker, markersize=4.5,
            elinewidth=1.1, capsize=3, label=name, zorder=3,
        )  # fmt: skip
    else:
        axes.plot(
            *(across, mean), color=colour, linewidth=1.6, marker=marker, markersize=2.8, label=name,
        )  # fmt: skip
        axes.fill_between(across, low, high, color=colour, alpha=0.16, linewidth=0)
    if curve.line is not None:
        fitted = np.geomspace(curve.line.first, curve.line.last, 50)
        heights = [curve.line.at(flops) for flops in fitted]
        axes.plot(
            *(fitted, heights), color=colour if bars else INK, linewidth=1.1,
            linestyle=(0, (4, 3)), zorder=2 if bars else 4,
        )  # fmt: skip


def _marks(axes: Axes, points: Sequence[Point], colour: str, row: int) -> None:
    """A cross where seeds diverged, above the values, since they have none.

    Along one run it is where they are first missing.
    """
    known: set[tuple[str, int]] = set()
    height, place = 0.97 - 0.07 * row, axes.get_xaxis_transform()
    for point in points:
        new = {(point.member, seed) for seed in point.diverged} - known
        known |= new
        if not new:
            continue
        seeds = len(point.losses) + len(point.diverged)
        axes.plot(point.flops, height, "x", color=colour, markersize=6, transform=place)
        axes.annotate(
            f"{len(point.diverged)} of {seeds} diverged", (point.flops, height), xycoords=place,
            xytext=(-6, 0), textcoords="offset points", ha="right", va="center", fontsize=7,
            color=colour,
        )  # fmt: skip


def number(value: float) -> str:
    """A gap or a ratio beside an axis, also a small one in full."""
    return f"{round(value, 7):.7g}".replace("-", "−")


def power_of_ten(value: float) -> str:
    """A number beside an axis, as 3 · 10¹²."""
    if value <= 0:
        return "0"
    exponent = int(np.floor(np.log10(value) + 1e-9))
    return rf"${value / 10**exponent:.3g}\cdot 10^{{{exponent}}}$"
