"""The parts of figures: a panel of many runs, by step or by sub-layer, and each run's look."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mhc_lightning.reporting import drawing, facts, words
from mhc_lightning.reporting.drawing import Look
from mhc_lightning.reporting.reading import Run
from mhc_lightning.reporting.series import Series, layer_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """One figure.

    Attributes:
        name: A word for files and ids.
        title: Above it.
        description: What it shows, in words.
        drawing: The figure.
    """

    name: str
    title: str
    description: str
    drawing: "Figure"


@dataclass(frozen=True)
class Section:
    """Figures that belong together.

    Attributes:
        title: The heading.
        about: How to read them.
        panels: The figures.
    """

    title: str
    about: str
    panels: list[Panel] = field(default_factory=list)


def looks(runs: Sequence[Run], baseline: Run | None) -> dict[str, Look]:
    """A colour for each run by name; runs that differ in their seed alone share it, not the dash.

    The baseline is grey.
    """
    groups: list[list[Run]] = [[baseline]] if baseline is not None else [[]]
    for run in runs:
        if run is baseline:
            continue
        for group in groups:
            if group and facts.same_but_for_the_seed(group[0], run):
                group.append(run)
                break
        else:
            groups.append([run])
    found = {}
    others = len(drawing.RUN_COLOURS) - 1
    for g, group in enumerate(groups):
        colour = f"run-{1 + (g - 1) % others if g else 0}"
        for k, run in enumerate(group):
            dash = drawing.DASHES[(k + (g - 1) // others if g else k) % len(drawing.DASHES)]
            found[run.name] = Look(run.name, colour, dash)
    return found


def by_step(
    runs: Sequence[Run],
    look: dict[str, Look],
    tag: str,
    name: str,
    title: str,
    up: str,
    *,
    width: float = 1.7,
    around: float | None = None,
    spread: bool = True,
) -> Iterator[Panel]:
    """One tag of all runs that logged it; `spread`: a logarithmic axis if values ask for it."""
    found = {run.name: run.scalars[tag].finite() for run in runs if tag in run.scalars}
    found = {run: series for run, series in found.items() if len(series)}
    if not found:
        return
    figure, axes = drawing.panel(title, "step", up)
    ends = []
    for run, series in found.items():
        drawing.line(axes, series, look[run], width=width)
        ends.append((float(series.values[-1]), look[run]))
    if around is not None:
        drawing.reference(axes, around)
    values = np.concatenate([series.values for series in found.values()])
    if not spread:
        values = np.append(values, 0.0)
    elif (values > 0).any():
        values = values[values > 0]
    drawing.fit_height(axes, values, around=around)
    drawing.whole_numbers(axes)
    drawing.names_beside(axes, ends)
    yield Panel(name, title, told(f"{title} against step", ends), figure)


def by_layer(
    runs: Sequence[Run],
    look: dict[str, Look],
    tag: str,
    name: str,
    title: str,
    around: float | None,
) -> Iterator[Panel]:
    """The last sample of a tag that is logged by sub-layer."""
    figure, axes = drawing.panel(title, "sub-layer", "last sample")
    ends, shown = [], []
    for run in runs:
        layers, _, values = layer_matrix(run.scalars, tag)
        if not layers:
            continue
        last = Series(np.array(layers), values[:, -1]).finite()
        if not len(last):
            continue
        drawing.line(axes, last, look[run.name], marks=len(layers) <= 40)
        ends.append((float(last.values[-1]), look[run.name]))
        shown.append(last.values)
    if not ends:
        return
    if around is not None:
        drawing.reference(axes, around)
    drawing.fit_height(axes, np.concatenate(shown), around=around)
    drawing.whole_numbers(axes)
    drawing.names_beside(axes, ends)
    largest = [
        f"{end.label} at most {words.gain(float(values.max()))}"
        for (_, end), values in zip(ends, shown, strict=True)
    ]
    yield Panel(name, title, f"{title}, by sub-layer at the end: {'; '.join(largest)}.", figure)


def told(what: str, ends: Sequence[tuple[float, Look]]) -> str:
    """A figure in words: what it shows, and where each line ends."""
    values = "; ".join(f"{look.label} {words.number(value)}" for value, look in ends)
    return f"{what}. At the end: {values}."
