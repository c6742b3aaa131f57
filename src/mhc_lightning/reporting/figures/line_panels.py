"""Panels of lines, one line per run: a metric by step, or by sub-layer at the end."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mhc_lightning.formatting import format_gain, format_number
from mhc_lightning.plotting.theme import draw_reference, fit_height, use_whole_numbers
from mhc_lightning.reporting.figures.axes import draw_line, label_lines, new_axes
from mhc_lightning.reporting.figures.run_styles import RunStyle
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.metric_series import Series, layer_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """One figure.

    Attributes:
        name: A word for file names and ids.
        title: The title above it.
        description: The figure in words, for readers who do not see it.
        figure: Matplotlib's figure.
    """

    name: str
    title: str
    description: str
    figure: "Figure"


def panel_by_step(
    runs: Sequence[LoggedRun],
    styles: Mapping[str, RunStyle],
    tag: str,
    name: str,
    title: str,
    ylabel: str,
    *,
    width: float = 1.7,
    reference: float | None = None,
    may_be_logarithmic: bool = True,
) -> Iterator[Panel]:
    """One metric of all runs that logged it, against the step; nothing if none did.

    Args:
        runs: The runs.
        styles: Their styles by name.
        tag: The metric.
        name: The panel's name.
        title: The panel's title.
        ylabel: The vertical axis' label.
        width: Of the lines, in points.
        reference: A value to compare with.
        may_be_logarithmic: False keeps the vertical axis linear, with zero on it.
    """
    lines = {run.name: run.scalars[tag].finite() for run in runs if tag in run.scalars}
    lines = {label: series for label, series in lines.items() if len(series)}
    if not lines:
        return
    figure, axes = new_axes(title, "step", ylabel)
    for label, series in lines.items():
        draw_line(axes, series, styles[label], width=width)
    if reference is not None:
        draw_reference(axes, reference)
    values = np.concatenate([series.values for series in lines.values()])
    if not may_be_logarithmic:
        values = np.append(values, 0.0)
    elif (values > 0).any():
        values = values[values > 0]
    fit_height(axes, values, around=reference)
    use_whole_numbers(axes)
    ends = [(float(series.values[-1]), styles[label]) for label, series in lines.items()]
    label_lines(axes, ends)
    yield Panel(name, title, describe_ends(f"{title} against step", ends), figure)


def panel_by_layer(
    runs: Sequence[LoggedRun],
    styles: Mapping[str, RunStyle],
    tag: str,
    name: str,
    title: str,
    reference: float | None,
    each: str = "sub-layer",
) -> Iterator[Panel]:
    """The last sample of a metric that is logged by sub-layer, or by block (`each`).

    Nothing if no run logged it.
    """
    lines: dict[str, Series] = {}
    for run in runs:
        layers, _, values = layer_matrix(run.scalars, tag)
        if layers:
            lines[run.name] = Series(np.array(layers), values[:, -1]).finite()
    lines = {label: series for label, series in lines.items() if len(series)}
    if not lines:
        return
    figure, axes = new_axes(title, each, "last sample")
    for label, series in lines.items():
        draw_line(axes, series, styles[label], marks=len(series) <= 40)
    if reference is not None:
        draw_reference(axes, reference)
    fit_height(axes, np.concatenate([s.values for s in lines.values()]), around=reference)
    use_whole_numbers(axes)
    label_lines(
        axes, [(float(series.values[-1]), styles[label]) for label, series in lines.items()]
    )
    largest = "; ".join(
        f"{label} at most {format_gain(float(series.values.max()))}"
        for label, series in lines.items()
    )
    yield Panel(name, title, f"{title}, by {each} at the end: {largest}.", figure)


def describe_ends(title: str, ends: Sequence[tuple[float, RunStyle]]) -> str:
    """A figure in words: its title, and the value at which each line ends."""
    values = "; ".join(f"{style.label} {format_number(value)}" for value, style in ends)
    return f"{title}. At the end: {values}."
