"""The look of recipes' figures: that of `report`, with several panels."""

from pathlib import Path
from typing import TYPE_CHECKING

from mhc_lightning.plotting.theme import FAINT, GRID, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RESOLUTION = 160  # pixels per inch


def plain(axes: "Axes") -> None:
    """Lines across, no frame, small faint numbers."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=TEXT - 0.5, labelcolor=FAINT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=FAINT, linewidth=0.8)


def save(figure: "Figure", file: Path) -> None:
    """Write a figure as PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=_RESOLUTION, facecolor="white")
