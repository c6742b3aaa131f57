"""The sections of figures on a report's page.

They correspond to figures of arXiv 2512.24880: loss gap and gradient norm to figures 2 and 5, gains
by sub-layer to figures 3 and 7.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mhc_lightning.formatting import format_gain
from mhc_lightning.plotting.theme import draw_reference, fit_height, use_whole_numbers
from mhc_lightning.reporting.baselines import baseline_of
from mhc_lightning.reporting.figures.axes import draw_line, label_lines, new_axes
from mhc_lightning.reporting.figures.heat_map import heat_map
from mhc_lightning.reporting.figures.line_panels import (
    Panel,
    describe_ends,
    panel_by_layer,
    panel_by_step,
)
from mhc_lightning.reporting.figures.memory_panels import memory_panels
from mhc_lightning.reporting.figures.run_styles import RunStyle
from mhc_lightning.reporting.gain_extremes import DIRECTIONS, KINDS, gain_tag, gains_by_layer
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.metric_series import GRADIENT_NORM, LOSS, VALIDATION_LOSS
from mhc_lightning.reporting.run_description import has_one_stream
from mhc_lightning.reporting.statistics import smoothing_width
from mhc_lightning.reporting.summary import AT_ONE

_EARLY = 0.05  # share of the steps; early values are large and set no vertical limits

Styles = Mapping[str, RunStyle]


@dataclass(frozen=True)
class Section:
    """Figures under one heading.

    Attributes:
        title: The heading.
        about: How to read the figures.
        panels: The figures.
    """

    title: str
    about: str
    panels: list[Panel]


def figure_sections(
    runs: Sequence[LoggedRun], styles: Styles, baseline: LoggedRun | None
) -> list[Section]:
    """Draw every section that these runs have data for."""
    sections = [
        Section(
            "Loss and gradient norm",
            "Curves of the loss are centred running means over 2% of the logged steps; the logged"
            " values are behind them, faint. Points are validation losses.",
            [*_loss(runs, styles), *_loss_gap(runs, styles, baseline), *_gradient(runs, styles)],
        ),
        Section(
            "Gains while training",
            "Amax gain: the most that the residual mappings can amplify a signal (forward, the"
            " largest absolute row sum) or a gradient (backward, column sum); 1 is ideal. Composite"
            " gains are those of the products over depth. The largest over sub-layers is shown.",
            list(_gains_by_step(runs, styles)),
        ),
        Section(
            "Gains by sub-layer, at the end",
            "The last sample of each run. Attention and feed-forward count as one sub-layer each,"
            " from 0. A composite gain at sub-layer l takes the product of all up to l forward, and"
            " of l and all after it backward.",
            list(_gains_by_layer(runs, styles)),
        ),
        Section(
            "Gains by sub-layer, while training",
            "Orange is above 1, blue is below 1, and 1 has the colour of the page; all share one"
            f" scale. Gains that stayed at 1 (to {AT_ONE:g}) are not drawn.",
            list(_heat_maps(runs)),
        ),
        Section(
            "Streams",
            "Diversity is 0 where all streams of a token are equal and 1 where they cancel. The"
            " Sinkhorn residual is the largest distance of a column or row sum from 1, over all"
            " tokens. Runs with one stream are left out.",
            list(_streams(runs, styles)),
        ),
        Section(
            "Memory of n-grams",
            "Samples of one micro-batch each. A gate at 0 is closed, at 1 open. What memory adds is"
            " compared with the streams (or the embedding) that it adds to. Rows touched are the"
            " different rows of all tables that the micro-batch reads. A collision is an n-gram"
            " whose row is that of another one of the micro-batch, too.",
            list(memory_panels(runs, styles)),
        ),
    ]
    return [section for section in sections if section.panels]


def _loss(runs: Sequence[LoggedRun], styles: Styles) -> Iterator[Panel]:
    figure, axes = new_axes("Training loss", "step", "nats per token")
    ends, shown = [], []
    for run in runs:
        if LOSS not in run.scalars:
            continue
        series, style = run.scalars[LOSS].finite(), styles[run.name]
        smooth = series.smoothed(smoothing_width(len(series)))
        if not len(smooth):
            continue
        draw_line(axes, series, style, faint=True)
        draw_line(axes, smooth, style)
        validation = run.scalars.get(VALIDATION_LOSS)
        if validation is not None:
            axes.plot(validation.steps, validation.values, linestyle="", marker="o", markersize=4,
                      color=style.ink, markeredgewidth=0, zorder=4)  # fmt: skip
        ends.append((float(smooth.values[-1]), style))
        shown.append(smooth.values)
    if not ends:
        return
    fit_height(axes, np.concatenate(shown))
    use_whole_numbers(axes)
    label_lines(axes, ends)
    about = describe_ends("Training loss against step", ends)
    yield Panel("loss", "Training loss", about, figure)


def _loss_gap(
    runs: Sequence[LoggedRun], styles: Styles, baseline: LoggedRun | None
) -> Iterator[Panel]:
    pairs = [(run, other) for run in runs if (other := baseline_of(run, runs, baseline))]
    baselines = list(dict.fromkeys(other.name for _, other in pairs))
    title = f"Loss gap to {baselines[0] if len(baselines) == 1 else 'the baseline of each seed'}"
    figure, axes = new_axes(title, "step", "nats per token, below 0 is better")
    ends, shown = [], []
    for run, other in pairs:
        if LOSS not in run.scalars or LOSS not in other.scalars:
            continue
        difference = run.scalars[LOSS].minus(other.scalars[LOSS]).finite()
        smooth = difference.smoothed(smoothing_width(len(difference)))
        if not len(smooth):
            continue
        draw_line(axes, difference, styles[run.name], faint=True)
        draw_line(axes, smooth, styles[run.name])
        ends.append((float(smooth.values[-1]), styles[run.name]))
        shown.append(smooth.values[math.floor(_EARLY * len(smooth)) :])
    if not ends:
        return
    draw_reference(axes, 0.0)
    values = np.append(np.concatenate(shown), 0.0)
    margin = 0.1 * float(np.ptp(values)) or 1e-3
    fit_height(axes, np.append(values, -margin))  # never logarithmic
    use_whole_numbers(axes)
    zero = [(0.0, styles[baselines[0]])] if len(baselines) == 1 else []
    label_lines(axes, [*ends, *zero])
    yield Panel("loss_gap", title, describe_ends(f"{title} against step", ends), figure)


def _gradient(runs: Sequence[LoggedRun], styles: Styles) -> Iterator[Panel]:
    yield from panel_by_step(
        runs, styles, GRADIENT_NORM, "gradient_norm", "Gradient norm", "before clipping", width=1.1
    )


def _gains_by_step(runs: Sequence[LoggedRun], styles: Styles) -> Iterator[Panel]:
    for kind in KINDS:
        for direction in DIRECTIONS:
            yield from panel_by_step(
                runs, styles, gain_tag(kind, direction), f"gain_{kind}_{direction}",
                f"{_KIND[kind]} gain, {direction}", "largest over sub-layers", reference=1.0,
            )  # fmt: skip


def _gains_by_layer(runs: Sequence[LoggedRun], styles: Styles) -> Iterator[Panel]:
    for kind in KINDS:
        for direction in DIRECTIONS:
            yield from panel_by_layer(
                runs, styles, gain_tag(kind, direction), f"gain_{kind}_{direction}_by_layer",
                f"{_KIND[kind]} gain, {direction}", reference=1.0,
            )  # fmt: skip


def _heat_maps(runs: Sequence[LoggedRun]) -> Iterator[Panel]:
    drawn = []
    for number, run in enumerate(runs):
        for kind in KINDS:
            for direction in reversed(DIRECTIONS):
                layers, steps, gains = gains_by_layer(run.scalars, gain_tag(kind, direction))
                logged = gains[~np.isnan(gains)]
                if len(logged) and np.abs(logged - 1).max() > AT_ONE:
                    drawn.append((number, run, kind, direction, layers, steps, gains))
    if not drawn:
        return
    finite = np.concatenate([g[np.isfinite(g) & (g > 0)] for *_, g in drawn])
    limit = max(2.0, float(np.exp(np.abs(np.log(finite)).max()))) if len(finite) else 2.0
    for number, run, kind, direction, layers, steps, gains in drawn:
        title = f"{run.name}: {_KIND[kind].lower()}, {direction}"
        logged = gains[~np.isnan(gains)]
        yield Panel(
            f"gain_{kind}_{direction}_over_time_{number}",
            title,
            f"{_KIND[kind]} {direction} gain of {run.name} by sub-layer and step: between"
            f" {format_gain(float(logged.min()))} and {format_gain(float(logged.max()))}.",
            heat_map(layers, steps, gains, limit, title),
        )


def _streams(runs: Sequence[LoggedRun], styles: Styles) -> Iterator[Panel]:
    several = [
        run
        for run in runs
        if not has_one_stream(run)
        and any(
            run.scalars[tag].values.any()
            for tag in ("stream_diversity/mean", "sinkhorn_residual/column")
            if tag in run.scalars
        )
    ]
    yield from panel_by_step(
        several, styles, "stream_diversity/mean", "diversity", "Stream diversity",
        "mean of sub-layers", may_be_logarithmic=False,
    )  # fmt: skip
    yield from panel_by_layer(
        several, styles, "stream_diversity", "diversity_by_layer",
        "Stream diversity, by sub-layer", reference=None,
    )  # fmt: skip
    for side in ("column", "row"):
        yield from panel_by_step(
            several, styles, f"sinkhorn_residual/{side}", f"sinkhorn_{side}",
            f"Sinkhorn residual, {side}s", "largest distance of a sum from 1",
        )  # fmt: skip


_KIND = {"composite": "Composite", "single": "Single-layer"}
