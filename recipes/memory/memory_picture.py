"""The figure of each part: gaps or losses over seeds, beside what the paper has."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from axes import plain, save
from gaps import estimate
from laws import PAPER, at, row_lines
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from parts import EQUAL_FLOPS, MEMORIES
from trained import Trained

from mhc_lightning.plotting.theme import DASHES, FAINT, GRID, INK, RUN_COLOURS, TEXT

_BASE, _OWN, _OTHER, _PAPER = RUN_COLOURS[0], RUN_COLOURS[1], RUN_COLOURS[2], RUN_COLOURS[4]


def draw_part(part: str, found: Sequence[Trained], file: Path) -> None:
    """Draw a part's figure; variants without a finite loss are left out."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    left = [one for one in found if one.losses]
    _DRAWERS[part](axes, left)
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=TEXT
        )
    save(figure, file)


def _points(
    axes: Axes,
    places: Sequence[float],
    values: Sequence[Mapping[int, float]],
    colour: str,
    name: str,
) -> None:
    """Each seed, faint, and means with their intervals."""
    for place, by_seed in zip(places, values, strict=True):
        axes.plot(
            [place] * len(by_seed), list(by_seed.values()), "o", color=colour, alpha=0.3, ms=3
        )
    means = [estimate(by_seed.values()) for by_seed in values]
    known = [(place, mean) for place, mean in zip(places, means, strict=True) if mean is not None]
    if not known:
        return
    # a single seed has no interval
    spread = [
        [mean.mean - (mean.mean if mean.low is None else mean.low) for _, mean in known],
        [(mean.mean if mean.high is None else mean.high) - mean.mean for _, mean in known],
    ]
    axes.errorbar(
        *([place for place, _ in known], [mean.mean for _, mean in known]), yerr=spread,
        color=colour, fmt="o", ms=5, capsize=3, elinewidth=1.1, label=name, zorder=3,
    )  # fmt: skip


def _titles(axes: Axes, title: str, across: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(across, fontsize=TEXT, color=FAINT)


def _zero(axes: Axes, name: str) -> None:
    axes.axhline(0, color=_BASE, linewidth=1.2, label=name, zorder=1)


def _allocation(axes: Axes, found: Sequence[Trained]) -> None:
    paper = PAPER["allocation"]
    _titles(axes, "validation loss (nats), minus that of experts alone", "share of experts")
    axes.axvspan(*paper["best_share"], color=GRID, zorder=0, label="paper's best shares")
    _zero(axes, "experts alone")
    moved = [one for one in found if one.variant.baseline is not None]
    places = [one.variant.place or 0.0 for one in moved]
    _points(axes, places, [one.gaps for one in moved], _OWN, "here")
    axes.plot([1.0], [0.0], "o", color=_BASE, ms=5)
    axes.plot(
        [float(np.mean(paper["best_share"]))], [paper["gap_at_best"]], "D", color=_PAPER,
        markerfacecolor="white", label="paper's gap there",
    )  # fmt: skip
    axes.invert_xaxis()


def _scaling(axes: Axes, found: Sequence[Trained]) -> None:
    _titles(axes, "validation loss (nats)", "rows per head")
    axes.set_xscale("log")
    base = next((one for one in found if one.variant.baseline is None), None)
    if base is not None:
        axes.axhline(base.mean, color=_BASE, linewidth=1.2, label="none", zorder=1)
    lines = row_lines(found)
    for memory, colour in zip(MEMORIES, (_OWN, _OTHER), strict=True):
        own = [one for one in found if one.variant.name.startswith(f"{memory} ")]
        places = [one.variant.place or 1.0 for one in own]
        _points(axes, places, [one.losses for one in own], colour, memory)
        line = lines[memory]
        if line is not None:
            across = np.geomspace(line.first, line.last, 20)
            axes.plot(
                *(across, [line.at(x) for x in across]), color=colour, linestyle=DASHES[1],
                label=f"{line.slope.mean:+.4f} per tenfold rows",
            )  # fmt: skip
            if memory == "over_encoding":
                slope = PAPER["scaling"]["over_encoding_slope"]
                steps = np.log10(across / line.centre)
                axes.plot(
                    *(across, line.value.mean + slope * steps), color=_PAPER, linestyle=DASHES[2],
                    label=f"paper's slope for it, {slope:+.4f}",
                )  # fmt: skip


def _where(axes: Axes, found: Sequence[Trained]) -> None:
    paper = PAPER["where"]
    _titles(axes, "validation loss (nats), minus that without memory", "block of the memory")
    _zero(axes, "none")
    single = [one for one in found if one.variant.place is not None]
    places = [one.variant.place or 0.0 for one in single]
    _points(axes, places, [one.gaps for one in single], _OWN, "one block")
    both = [one.gap for one in found if one.variant.place is None and one.gap is not None]
    for gap in both:
        axes.axhline(
            gap.mean, color=_OTHER, linestyle=DASHES[1], label="same rows in two blocks", zorder=1
        )
    last = max(places, default=1.0)
    axes.plot(
        [depth * last for depth, _ in paper["gaps_by_depth"]],
        [gap for _, gap in paper["gaps_by_depth"]], "D", color=_PAPER, markerfacecolor="white",
        label="paper, at the same depth of 12 blocks",
    )  # fmt: skip
    axes.set_xticks(places)


def _what_for(axes: Axes, found: Sequence[Trained]) -> None:
    own = {one.variant.name: one for one in found}
    names = [n for n in own if n != "none" and not n.endswith(EQUAL_FLOPS)]
    _titles(axes, "validation loss (nats), minus that without extra parameters", "")
    _zero(axes, "none")
    for ending, colour, shift, label in (
        ("", _OWN, -0.12, "after equal tokens"),
        (EQUAL_FLOPS, _OTHER, 0.12, "after equal FLOPs"),
    ):
        gaps = [at(own, name, ending).gaps for name in names]
        _points(axes, [k + shift for k in range(len(names))], gaps, colour, label)
    experts = own["experts"].gap if "experts" in own else None
    if "engram" in names and experts is not None:
        axes.plot(
            [names.index("engram")], [experts.mean + PAPER["what_for"]["engram_minus_experts"]],
            "D", color=_PAPER, markerfacecolor="white", label="paper's difference to experts",
        )  # fmt: skip
    _named(axes, names)


def _connections(axes: Axes, found: Sequence[Trained]) -> None:
    _titles(axes, "validation loss (nats), minus that of the connection without memory", "")
    _zero(axes, "none")
    names = [one.variant.name for one in found if one.variant.baseline is None]
    for memory, colour, shift in zip(MEMORIES, (_OWN, _OTHER), (-0.12, 0.12), strict=True):
        own = [one for one in found if one.variant.name.endswith(f", {memory}")]
        places = [names.index(one.variant.baseline or "") + shift for one in own if one.gaps]
        _points(axes, places, [one.gaps for one in own if one.gaps], colour, memory)
    _named(axes, names)


def _named(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", labelcolor=INK)
    axes.set_xlim(-0.5, len(names) - 0.5)


_DRAWERS: dict[str, Callable[[Axes, Sequence[Trained]], None]] = {
    "allocation": _allocation,
    "scaling": _scaling,
    "where": _where,
    "what_for": _what_for,
    "connections": _connections,
}
