"""Draws the comparison of initialisations: stream diversity and validation losses."""

from collections.abc import Sequence
from pathlib import Path

from axes import plain, save
from candidate import Candidate

from mhc_lightning.plotting.theme import DASHES, FAINT, GRID, INK, RUN_COLOURS, TEXT


def draw_diversity(candidates: Sequence[Candidate], default: Candidate | None, file: Path) -> None:
    """Diversity over time and over depth, and validation losses: a point for every seed.

    Losses are drawn minus the default's of the same seed, if that was run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    over_time, over_depth, losses = figure.subplots(1, 3)
    for axes, title, across in (
        (over_time, "stream diversity, mean of sub-layers", "step"),
        (over_depth, "stream diversity at the end", "sub-layer"),
        (losses, "validation loss (nats)" + (", minus the default's" if default else ""), ""),
    ):
        plain(axes)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel(across, fontsize=TEXT, color=FAINT)
    handles = []
    for k, candidate in enumerate(candidates):
        turn, number = divmod(k, len(RUN_COLOURS))
        colour, dash = RUN_COLOURS[number], DASHES[turn]
        for axes, points in (
            (over_time, candidate.diversity_by_step()),
            (over_depth, candidate.diversity_by_layer()),
        ):
            (line,) = axes.plot(*points, color=colour, linestyle=dash, linewidth=1.7)
        handles.append(line)
        values = (
            candidate.gaps(default) if default else list(candidate.validation_losses().values())
        )
        losses.plot(values, [k] * len(values), "o", color=colour, markersize=5, clip_on=False)
    names = [candidate.name for candidate in candidates]
    losses.set_yticks(range(len(names)), names)
    losses.tick_params(axis="y", labelcolor=INK)
    losses.grid(axis="x", color=GRID, linewidth=0.8)
    losses.invert_yaxis()
    figure.legend(handles, names, loc="outside lower center", ncols=7, frameon=False, fontsize=TEXT)
    save(figure, file)
