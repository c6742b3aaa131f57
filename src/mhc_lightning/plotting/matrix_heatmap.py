"""The heat map of one mixing matrix, with the sums of its rows and columns."""

import numpy as np

from mhc_lightning.formatting import format_cell, format_gain
from mhc_lightning.plotting.theme import FAINT, INK, drawable, new_picture, to_array


def matrix_heatmap(matrix: np.ndarray, title: str, step: int | None) -> np.ndarray:
    """Draw a matrix in the manner of the paper's figure 8: cells, row sums, column sums.

    Colours are centred on zero and end at ±1, or at the largest |entry| where that is larger, so
    that pictures of doubly stochastic matrices can be compared with one another.

    Args:
        matrix: [n, n].
        title: The picture's title.
        step: Optimizer steps completed; None leaves the step out.

    Returns:
        uint8 image [height, width, 3].
    """
    from matplotlib.colors import Normalize

    n = matrix.shape[0]
    with np.errstate(over="ignore", invalid="ignore"):
        row_sums, column_sums = matrix.sum(1), matrix.sum(0)
    shown = drawable(matrix)
    finite = np.abs(shown[np.isfinite(shown)])
    limit = max(1.0, float(finite.max(initial=0.0)))
    cell = {1: 1.5, 2: 1.1, 3: 0.95}.get(n, 0.8 if n <= 5 else 0.66)  # inches
    # Positions in inches: exact at every n, in half the time of an automatic layout.
    side, left, below = (n + 1) * cell, 0.75, 0.4
    width, height = max(left + side + 1.0, 3.4), below + side + 0.7
    figure = new_picture(width, height)
    axes = figure.add_axes((left / width, below / height, side / width, side / height))
    image = axes.imshow(shown, cmap="RdBu_r", norm=Normalize(-limit, limit))
    numbers = [format_cell(float(v)) for v in (*matrix.flat, *row_sums, *column_sums)]
    size = min(11.0, 72 * cell / (0.62 * max(4, *map(len, numbers))))  # fits the widest in a cell
    for i in range(n):
        for j in range(n):
            value = float(matrix[i, j])
            ink = "white" if abs(value) > 0.6 * limit else INK
            axes.text(j, i, format_cell(value), ha="center", va="center", fontsize=size, color=ink)
        for x, y, total in ((n, i, row_sums[i]), (i, n, column_sums[i])):
            axes.text(x, y, format_cell(float(total)), ha="center", va="center", fontsize=size)
    axes.set(xlim=(-0.5, n + 0.5), ylim=(n + 0.5, -0.5))
    streams = [str(i + 1) for i in range(n)]
    axes.set_xticks(range(n + 1), [*streams, "row sum"])
    axes.set_yticks(range(n + 1), [*streams, "column\nsum"])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8.5, labelcolor=FAINT)
    edges = np.arange(n + 1) - 0.5
    for draw_lines in (axes.vlines, axes.hlines):  # gaps between cells
        draw_lines(edges, -0.5, n - 0.5, color="white", linewidth=1.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    corner = ((left + side + 0.1) / width, (below + cell) / height)
    bar = figure.colorbar(
        image, cax=figure.add_axes((*corner, 0.13 / width, (side - cell) / height))
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=FAINT)
    forward, backward = (float(np.abs(sums).max()) for sums in (row_sums, column_sums))
    gain = f"Amax {format_gain(forward)} forward, {format_gain(backward)} backward"
    figure.text(0.15 / width, 1 - 0.28 / height, title, fontsize=11, weight="bold")
    when = "" if step is None else f"step {step:,}   "
    figure.text(0.15 / width, 0.12 / height, f"{when}{gain}", fontsize=8.5, color=INK)
    return to_array(figure)
