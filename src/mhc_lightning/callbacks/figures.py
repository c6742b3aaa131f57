"""The pictures: gain profiles and stream matrices, drawn straight into arrays.

Uses matplotlib's object interface, so nothing here touches a display or pyplot's global state.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT = "#222222", "#8a8a8a"
_FORWARD, _BACKWARD = "#1f6f8b", "#d1495b"


def gain_profile(gains: Mapping[str, Sequence[float]], step: int | None) -> np.ndarray:
    """Gain against sub-layer: single layers above, composites below.

    Args:
        gains: By tag ``amax_gain/{single,composite}/{forward,backward}``, one value per sub-layer.
        step: Optimizer steps completed, for the title; None leaves them out.

    Returns:
        uint8 image [height, width, 3].
    """
    figure = _figure(5.0, 5.2)
    panels = figure.subplots(2, 1)
    figure.subplots_adjust(left=0.11, right=0.97, top=0.87, bottom=0.09, hspace=0.42)
    for axes, kind in zip(panels, ("single", "composite"), strict=True):
        for direction, colour, marker in (
            ("forward", _FORWARD, "o"),
            ("backward", _BACKWARD, "s"),
        ):
            values = np.asarray(gains[f"amax_gain/{kind}/{direction}"], dtype=float)
            axes.plot(
                range(len(values)),
                _drawable(values),
                color=colour,
                marker=marker,
                markersize=3.5 if len(values) <= 40 else 0,
                linewidth=1.4,
                label=f"{direction}, max {format_number(float(values.max()))}",
            )
        axes.axhline(1.0, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        both = [gains[f"amax_gain/{kind}/{d}"] for d in ("forward", "backward")]
        _gain_axis(axes, _drawable(np.concatenate(both)).tolist())
        axes.set_title(
            f"{'Single-layer' if kind == 'single' else 'Composite'} gain", fontsize=10, loc="left"
        )
        axes.set_xlabel("sub-layer")
        # On the title's line, where no data can be underneath.
        axes.legend(
            frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.02, 0.98),
            columnspacing=1.2, handlelength=1.4,
        )  # fmt: skip
    title = "Amax gain" if step is None else f"Amax gain, step {step:,}"
    figure.text(0.02, 0.95, title, fontsize=11, weight="bold")
    return _render(figure)


def matrix_heatmap(matrix: np.ndarray, title: str, step: int | None) -> np.ndarray:
    """One matrix in the manner of the paper's figure 8: cells, row sums, column sums.

    Colours are centred on zero and run to ±1, further only if an entry does, so that pictures of
    doubly stochastic matrices can be compared with one another.

    Args:
        matrix: [n, n].
        title: What it is.
        step: Optimizer steps completed; None leaves them out.

    Returns:
        uint8 image [height, width, 3].
    """
    from matplotlib.colors import Normalize

    n = matrix.shape[0]
    with np.errstate(over="ignore", invalid="ignore"):
        rows, columns = matrix.sum(1), matrix.sum(0)
    shown = _drawable(matrix)
    finite = np.abs(shown[np.isfinite(shown)])
    limit = max(1.0, float(finite.max(initial=0.0)))
    cell = {1: 1.5, 2: 1.1, 3: 0.95}.get(n, 0.8 if n <= 5 else 0.66)  # inches
    # Placed by hand, in inches: exact at every n, and half the time of an automatic layout.
    side, left, below = (n + 1) * cell, 0.75, 0.4
    width, height = max(left + side + 1.0, 3.4), below + side + 0.7
    figure = _figure(width, height)
    axes = figure.add_axes((left / width, below / height, side / width, side / height))
    image = axes.imshow(shown, cmap="RdBu_r", norm=Normalize(-limit, limit))
    numbers = [format_number(float(v)) for v in (*matrix.flat, *rows, *columns)]
    size = min(11.0, 72 * cell / (0.62 * max(4, *map(len, numbers))))  # fits the widest in a cell
    for i in range(n):
        for j in range(n):
            value = float(matrix[i, j])
            ink = "white" if abs(value) > 0.6 * limit else _INK
            axes.text(
                j, i, format_number(value), ha="center", va="center", fontsize=size, color=ink
            )
        axes.text(n, i, format_number(float(rows[i])), ha="center", va="center", fontsize=size)
        axes.text(i, n, format_number(float(columns[i])), ha="center", va="center", fontsize=size)
    axes.set(xlim=(-0.5, n + 0.5), ylim=(n + 0.5, -0.5))
    streams = [str(i + 1) for i in range(n)]
    axes.set_xticks(range(n + 1), [*streams, "row sum"])
    axes.set_yticks(range(n + 1), [*streams, "column\nsum"])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8.5, labelcolor=_FAINT)
    edges = np.arange(n + 1) - 0.5
    for lines in (axes.vlines, axes.hlines):  # gaps between cells
        lines(edges, -0.5, n - 0.5, color="white", linewidth=1.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    beside = ((left + side + 0.1) / width, (below + cell) / height)
    bar = figure.colorbar(
        image, cax=figure.add_axes((*beside, 0.13 / width, (side - cell) / height))
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=_FAINT)
    gain = f"Amax {format_number(_amax(rows))} forward, {format_number(_amax(columns))} backward"
    figure.text(0.15 / width, 1 - 0.28 / height, title, fontsize=11, weight="bold")
    when = "" if step is None else f"step {step:,}   "
    figure.text(0.15 / width, 0.12 / height, f"{when}{gain}", fontsize=8.5, color=_INK)
    return _render(figure)


def format_number(value: float) -> str:
    """A few characters: 0.03, −12.3, 509.1, 3012, 3e+04, nan."""
    size = abs(value)
    digits = ".2f" if size < 9.995 else ".1f" if size < 999.95 else ".0f"
    text = format(value, digits if size < 99999.5 or not np.isfinite(value) else ".0e")
    return text.lstrip("-") if text == "-0.00" else text.replace("-", "−")


def _drawable(values: np.ndarray) -> np.ndarray:
    """Numbers that matplotlib can place on an axis; others are gaps, as NaN is."""
    size = np.abs(np.asarray(values, dtype=float))
    return np.where((size < 1e100) & ((size > 1e-100) | (size == 0)), values, np.nan)


def _amax(sums: np.ndarray) -> float:
    return float(np.abs(sums).max())


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, facecolor="white")


def _render(figure: "Figure") -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _gain_axis(axes: "Axes", values: Sequence[float]) -> None:
    """Logarithmic where gains spread over more than a factor of five, else linear around 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    finite = [v for v in values if np.isfinite(v)]
    low, high = min([1.0, *finite]), max([1.0, *finite])
    if low > 0 and high / low > 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        margin = max(0.02, 0.12 * (high - low))
        axes.set_ylim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    style: dict[str, Any] = {"color": "#bbbbbb"}
    for side in ("left", "bottom"):
        axes.spines[side].set(**style)
