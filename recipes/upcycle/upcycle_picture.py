"""The figures of the recipe: losses, diversity and gains by sub-layer, and weights of streams."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from axes import plain, save
from continued import Continued
from variants import ALL, BASELINE, VARIANTS

from mhc_lightning.plotting.theme import (
    DASHES,
    FAINT,
    GRID,
    INK,
    RUN_COLOURS,
    TEXT,
    use_whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMOOTH = 9  # steps of a running mean, at most; a third of the run


def draw_losses(found: Sequence[Continued], baseline: Continued | None, file: Path) -> None:
    """Training and held-out losses minus the pretrained model's, and gaps to the baseline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.0), layout="constrained")
    training, held_out, gaps = figure.subplots(1, 3)
    _titles(training, "training loss minus pretrained (nats)", "step")
    _titles(held_out, "held-out loss minus pretrained (nats)", "step")
    _titles(gaps, "held-out loss minus residual, at the end", "")
    for axes in (training, held_out):
        axes.axhline(0, color=FAINT, linewidth=0.9)
        use_whole_numbers(axes)
    for one in found:
        look = _look(one)
        mean = np.mean(list(one.training().values()), axis=0)
        width = max(1, min(_SMOOTH, len(mean) // 3))
        kernel = np.full(width, 1 / width)
        smooth = np.convolve(mean, kernel, mode="valid")
        training.plot(np.arange(len(smooth)) + (len(mean) - len(smooth)) / 2 + 1, smooth, **look)
        losses = list(one.held_out().values())
        steps = list(losses[0])
        held_out.plot(
            steps, [np.mean([by[s] - by[0] for by in losses]) for s in steps], marker="o", ms=3,
            **look,
        )  # fmt: skip
    compared = [one for one in found if one is not baseline]
    for k, one in enumerate(compared):
        theirs = baseline.ends() if baseline else {}
        values = [end - theirs[seed] for seed, end in one.ends().items() if seed in theirs]
        gaps.plot(values, [k] * len(values), "o", color=_look(one)["color"], ms=5, clip_on=False)
    gaps.locator_params(axis="x", nbins=6)
    gaps.axvline(0, color=FAINT, linewidth=0.9)
    gaps.set_yticks(range(len(compared)), [one.name for one in compared])
    gaps.tick_params(axis="y", labelcolor=INK)
    gaps.grid(axis="x", color=GRID, linewidth=0.8)
    gaps.invert_yaxis()
    _legend(figure, training, found)
    save(figure, file)


def draw_streams(found: Sequence[Continued], file: Path) -> None:
    """Diversity, composite gains and the mixing matrix's diagonal by sub-layer, at the end."""
    from matplotlib.figure import Figure

    wide = [one for one in found if one.name != BASELINE]
    figure = Figure(figsize=(12.5, 4.0), layout="constrained")
    panels = figure.subplots(1, 4)
    for axes, title, tag in zip(
        panels,
        (
            "stream diversity", "composite gain, forward", "composite gain, backward",
            "mean diagonal of the mixing matrix",
        ),
        (
            "stream_diversity", "amax_gain/composite/forward", "amax_gain/composite/backward",
            "kept",
        ),
        strict=True,
    ):  # fmt: skip
        _titles(axes, title, "sub-layer")
        use_whole_numbers(axes)
        for one in wide:
            axes.plot(one.by_layer(tag), **_look(one))
    _legend(figure, panels[0], wide)
    save(figure, file)


def draw_weights(found: Sequence[Continued], file: Path) -> None:
    """Read and write weights by sub-layer and stream at the end, and their changes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 1.15 * len(found) + 0.9), layout="constrained")
    grid = figure.subplots(len(found), 4, squeeze=False)
    columns: list[tuple[str, list[np.ndarray], Any]] = []
    for what in ("read", "write"):
        ends = [one.weights(what) for one in found]
        columns.append((f"{what} weights at the end", ends, "viridis"))
        changes = [one.weights(what) - one.weights(what, 0) for one in found]
        columns.append(("their change", changes, "RdBu_r"))
    for column, (title, images, colours) in enumerate(columns):
        high = max(float(np.abs(image).max()) for image in images)
        low = -high if colours == "RdBu_r" else min(0.0, *(float(i.min()) for i in images))
        for row, (one, image) in enumerate(zip(found, images, strict=True)):
            axes = grid[row, column]
            drawn = axes.imshow(
                image, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest"
            )
            axes.tick_params(length=0, labelsize=TEXT - 1.5, labelcolor=FAINT)
            axes.set_yticks(range(len(image)))
            use_whole_numbers(axes)
            for side in axes.spines.values():
                side.set_visible(False)
            if row == 0:
                axes.set_title(title, fontsize=10, color=INK, loc="left")
            if row == len(found) - 1:
                axes.set_xlabel("sub-layer", fontsize=TEXT, color=FAINT)
            if column == 0:
                axes.set_ylabel(
                    f"{one.name.removeprefix('connections_')}\nstream", fontsize=TEXT, color=INK
                )
        bar = figure.colorbar(drawn, ax=list(grid[:, column]), fraction=0.05, pad=0.02)
        bar.ax.tick_params(length=0, labelsize=TEXT - 1.5, labelcolor=FAINT)
        bar.outline.set_visible(False)
    save(figure, file)


def _titles(axes: "Axes", title: str, across: str) -> None:
    plain(axes)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(across, fontsize=TEXT, color=FAINT)


def _look(one: Continued) -> dict[str, Any]:
    places = [variant.name for variant in VARIANTS.values() if variant.train == ALL]
    colour = places.index(one.name.removeprefix("connections_"))
    return {
        "color": RUN_COLOURS[colour],
        "linestyle": DASHES[0 if one.variant.train == ALL else 1],
        "linewidth": 1.6,
    }


def _legend(figure: "Figure", axes: "Axes", found: Sequence[Continued]) -> None:
    handles = [axes.plot([], [], **_look(one))[0] for one in found]
    names = [one.name for one in found]
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=TEXT)
