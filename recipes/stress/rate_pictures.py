"""Draws the results of a stress test: losses by learning rate, and the largest stable rates."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axes import plain, save
from cell import Cell

from mhc_lightning.plotting.theme import DASHES, FAINT, GRID, INK, RUN_COLOURS, TEXT

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_TALLEST = 4.0  # nats from the lowest loss to the upper edge, at most


def draw_loss_by_rate(cells: Sequence[Cell], file: Path) -> None:
    """Last loss against learning rate: a panel for each depth and precision.

    A cross marks the run that failed, an arrow at the upper edge one that lies above it or was not
    finite.
    """
    from matplotlib.figure import Figure

    precisions = list(dict.fromkeys(cell.precision for cell in cells))
    depths = list(dict.fromkeys(cell.depth for cell in cells))
    figure = Figure(
        figsize=(4.2 * len(depths) + 1.6, 3.0 * len(precisions) + 0.5), layout="constrained"
    )
    grid = figure.subplots(len(precisions), len(depths), squeeze=False, sharex=True, sharey=True)
    shown = [o.loss for cell in cells for o in cell.outcomes.values() if o.loss < float("inf")]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    edge = min(high + 0.06 * (high - low), low + _TALLEST)
    colours = _colours(cells)
    for row, precision in zip(grid, precisions, strict=True):
        for axes, depth in zip(row, depths, strict=True):
            plain(axes)
            _rates_across(axes, cells)
            axes.set_title(f"{depth} blocks, {precision}", fontsize=10, color=INK, loc="left")
            for cell in cells:
                if (cell.depth, cell.precision) == (depth, precision):
                    _climb(axes, cell, colours[cell.connection], edge)
    for axes in grid[-1]:
        axes.set_xlabel("learning rate", fontsize=TEXT, color=FAINT)
    for row in grid:
        row[0].set_ylabel("last training loss (nats)", fontsize=TEXT, color=FAINT)
    handles, labels = _legend(grid[0][0], colours)
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=TEXT)
    save(figure, file)


def draw_largest_stable(cells: Sequence[Cell], file: Path) -> None:
    """The largest stable learning rate of each connection, for every depth and precision."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(cell.connection for cell in cells))
    places = list(dict.fromkeys((cell.depth, cell.precision) for cell in cells))
    figure = Figure(figsize=(8.4, 0.62 * len(names) + 1.3), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    others = RUN_COLOURS[1:]
    colours = {place: others[k % len(others)] for k, place in enumerate(places)}
    for k, (place, colour) in enumerate(colours.items()):
        drift = 0.5 * ((k + 0.5) / len(places) - 0.5)
        for cell in cells:
            if (cell.depth, cell.precision) != place:
                continue
            rate = cell.largest_stable
            shape = "x" if rate is None else "o" if cell.failed else ">"
            at = min(cell.outcomes) if rate is None else rate
            height = names.index(cell.connection) + drift
            axes.plot(at, height, shape, markersize=7, color=colour, clip_on=False)
    handles = [axes.plot([], [], "o", color=colour)[0] for colour in colours.values()]
    handles += [axes.plot([], [], shape, color=FAINT)[0] for shape in ">x"]
    labels = [f"{depth} blocks, {precision}" for depth, precision in places]
    labels += ["none that was tried failed", "the first one failed"]
    _rates_across(axes, cells)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelsize=TEXT, labelcolor=INK)
    axes.invert_yaxis()
    axes.set_xlabel("largest stable learning rate", fontsize=TEXT, color=FAINT)
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=TEXT)
    save(figure, file)


def _climb(axes: "Axes", cell: Cell, look: tuple[str, Any], edge: float) -> None:
    rates, outcomes = zip(*sorted(cell.outcomes.items()), strict=True)
    heights = [min(outcome.loss, edge) for outcome in outcomes]
    colour, dash = look
    axes.plot(rates, heights, color=colour, linestyle=dash, linewidth=1.6)
    for rate, height, outcome in zip(rates, heights, outcomes, strict=True):
        shape = "o" if outcome.stable else "x" if outcome.loss < edge else "^"
        axes.plot(rate, height, shape, color=colour, markersize=5)


def _rates_across(axes: "Axes", cells: Sequence[Cell]) -> None:
    """A logarithmic axis of learning rates, every other one that was tried named."""
    from matplotlib.ticker import NullLocator

    rates = sorted({rate for cell in cells for rate in cell.outcomes})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(rates, [f"{rate:g}" if k % 2 == 0 else "" for k, rate in enumerate(rates)])


def _colours(cells: Sequence[Cell]) -> dict[str, tuple[str, Any]]:
    names = dict.fromkeys(cell.connection for cell in cells)
    return {
        name: (RUN_COLOURS[k % len(RUN_COLOURS)], DASHES[k // len(RUN_COLOURS)])
        for k, name in enumerate(names)
    }


def _legend(axes: "Axes", colours: dict[str, tuple[str, Any]]) -> tuple[list["Artist"], list[str]]:
    lines = [
        axes.plot([], [], color=colour, linestyle=dash)[0] for colour, dash in colours.values()
    ]
    marks = [axes.plot([], [], shape, color=FAINT)[0] for shape in "x^"]
    return [*lines, *marks], [*colours, "failed", "beyond, or not finite"]
