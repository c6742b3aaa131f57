"""Scores on benchmarks, drawn: a panel for each row of the table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from axes import plain, save
from benchmark_scores import MODELS, Row

from mhc_lightning.plotting.theme import FAINT, INK, RUN_COLOURS, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACROSS = 4  # panels
_COLOURS = dict(zip(MODELS, RUN_COLOURS, strict=False))


def draw(rows: Sequence[Row], about: str, file: Path) -> None:
    """Each model's score with its standard error, and the paper's where there is one.

    Args:
        rows: What to draw.
        about: Said above all panels.
        file: The PNG to write.
    """
    from matplotlib.figure import Figure

    columns = min(_ACROSS, len(rows))
    lines = -(-len(rows) // columns)
    size = (max(2.5 * columns, 5.2), 2.5 * lines + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(about, fontsize=TEXT, color=FAINT, x=0.01, ha="left")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, row in zip(grid, rows, strict=False):
        _panel(axes, row)
    for axes in list(grid)[len(rows) :]:
        axes.set_visible(False)
    first = grid[0]
    handles = [first.errorbar([], [], [], fmt="o", color=FAINT, markersize=5)]
    labels = ["measured, ± standard error"]
    if any(row.paper for row in rows):
        handles.append(first.plot([], [], "D", color=FAINT, markerfacecolor="none")[0])
        labels.append("arXiv 2512.24880, Table 4: 27B parameters")
    figure.legend(
        handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=TEXT,
        labelcolor=FAINT,
    )  # fmt: skip
    save(figure, file)


def _panel(axes: "Axes", row: Row) -> None:
    from matplotlib.ticker import MaxNLocator

    plain(axes)
    shots = "" if row.shots is None else f", {row.shots}-shot"
    axes.set_title(f"{row.label}{shots}", fontsize=10, color=INK, loc="left", pad=16)
    axes.text(0, 1.02, row.unit, transform=axes.transAxes, fontsize=TEXT - 1, color=FAINT)
    for place, (name, score) in enumerate(row.scores.items()):
        if score.value is not None:
            axes.errorbar(
                place, score.value, score.error or 0.0, fmt="o", color=_COLOURS[name],
                markersize=6, capsize=3,
            )  # fmt: skip
        if row.paper:
            axes.plot(
                place, row.paper.scores[name], "D", color=_COLOURS[name], markerfacecolor="none",
                markersize=6,
            )  # fmt: skip
    axes.set_xticks(range(len(row.scores)), list(row.scores))
    axes.set_xlim(-0.6, len(row.scores) - 0.4)
    axes.margins(y=0.15)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter("{x:.4g}")
