"""The page's figures: what each plots, and how it is told to those who do not see it.

They correspond to the paper's (arXiv 2512.24880): loss gap and gradient norm are its figures 2 and
5, gains by sub-layer its figures 3 and 7.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from mhc_lightning.reporting import drawing, facts, words
from mhc_lightning.reporting.drawing import Look
from mhc_lightning.reporting.gains import DIRECTIONS, KINDS, gain_tag, gains_by_layer
from mhc_lightning.reporting.heat_map import heat_map
from mhc_lightning.reporting.panels import Panel, Section, by_layer, by_step, looks, told
from mhc_lightning.reporting.reading import Run
from mhc_lightning.reporting.statistics import smoothing_width
from mhc_lightning.reporting.summary import AT_ONE, GRADIENT, LOSS, VALIDATION, baseline_of

_EARLY = 0.05  # of the steps, which set no vertical limits: there everything is large


def draw_all(runs: Sequence[Run], baseline: Run | None) -> list[Section]:
    """Every section that these runs have data for."""
    look = looks(runs, baseline)
    sections = [
        Section(
            "Loss and gradient norm",
            "Curves of the loss are centred running means over 2% of the logged steps; what was"
            " logged is behind them, faint. Points are validation losses.",
            [*_loss(runs, look), *_gap(runs, look, baseline), *_gradient(runs, look)],
        ),
        Section(
            "Gains while training",
            "Amax gain: the most that the residual mappings can amplify a signal (forward, the"
            " largest absolute row sum) or a gradient (backward, column sum); 1 is ideal. Composite"
            " gains are those of the products over depth. The largest over sub-layers is shown.",
            list(_gains_by_step(runs, look)),
        ),
        Section(
            "Gains by sub-layer, at the end",
            "The last sample of each run. Attention and feed-forward count as one sub-layer each,"
            " from 0. A composite gain at sub-layer l takes the product of all up to l forward, and"
            " of l and all after it backward.",
            list(_gains_by_layer(runs, look)),
        ),
        Section(
            "Gains by sub-layer, while training",
            "Orange is above 1, blue below, and 1 itself is the page's own colour; all share one"
            f" scale. Gains that stayed at 1 (to {AT_ONE:g}) are not drawn.",
            list(_heat_maps(runs)),
        ),
        Section(
            "Streams",
            "Diversity is 0 where all streams of a token are equal and 1 where they cancel. The"
            " Sinkhorn residual is the largest distance of a column or row sum from 1, over all"
            " tokens. Runs with one stream are left out.",
            list(_streams(runs, look)),
        ),
    ]
    return [section for section in sections if section.panels]


def _loss(runs: Sequence[Run], look: dict[str, Look]) -> Iterator[Panel]:
    chosen = [run for run in runs if len(run.scalars.get(LOSS, ()))]
    if not chosen:
        return
    figure, axes = drawing.panel("Training loss", "step", "nats per token")
    ends, shown = [], []
    for run in chosen:
        series = run.scalars[LOSS].finite()
        smooth = series.smoothed(smoothing_width(len(series)))
        if not len(smooth):
            continue
        drawing.line(axes, series, look[run.name], faint=True)
        drawing.line(axes, smooth, look[run.name])
        validation = run.scalars.get(VALIDATION)
        if validation is not None:
            axes.plot(validation.steps, validation.values, linestyle="", marker="o", markersize=4,
                      color=look[run.name].ink, markeredgewidth=0, zorder=4)  # fmt: skip
        ends.append((float(smooth.values[-1]), look[run.name]))
        shown.append(smooth.values)
    if not ends:
        return
    drawing.fit_height(axes, np.concatenate(shown))
    drawing.whole_numbers(axes)
    drawing.names_beside(axes, ends)
    yield Panel("loss", "Training loss", told("Training loss against step", ends), figure)


def _gap(runs: Sequence[Run], look: dict[str, Look], baseline: Run | None) -> Iterator[Panel]:
    compared = [(run, other) for run in runs if (other := baseline_of(run, runs, baseline))]
    names = list(dict.fromkeys(other.name for _, other in compared))
    title = f"Loss gap to {names[0] if len(names) == 1 else 'the baseline of each seed'}"
    figure, axes = drawing.panel(title, "step", "nats per token, below 0 is better")
    ends, shown = [], []
    for run, other in compared:
        if LOSS not in run.scalars or LOSS not in other.scalars:
            continue
        difference = run.scalars[LOSS].minus(other.scalars[LOSS]).finite()
        smooth = difference.smoothed(smoothing_width(len(difference)))
        if not len(smooth):
            continue
        drawing.line(axes, difference, look[run.name], faint=True)
        drawing.line(axes, smooth, look[run.name])
        ends.append((float(smooth.values[-1]), look[run.name]))
        shown.append(smooth.values[math.floor(_EARLY * len(smooth)) :])
    if not ends:
        return
    drawing.reference(axes, 0.0)
    values = np.append(np.concatenate(shown), 0.0)
    margin = 0.1 * float(np.ptp(values)) or 1e-3
    drawing.fit_height(axes, np.append(values, -margin))  # never logarithmic
    drawing.whole_numbers(axes)
    zero = [(0.0, look[names[0]])] if len(names) == 1 else []
    drawing.names_beside(axes, [*ends, *zero])
    yield Panel("loss_gap", title, told(f"{title} against step", ends), figure)


def _gradient(runs: Sequence[Run], look: dict[str, Look]) -> Iterator[Panel]:
    yield from by_step(
        runs, look, GRADIENT, "gradient_norm", "Gradient norm", "before clipping", width=1.1
    )


def _gains_by_step(runs: Sequence[Run], look: dict[str, Look]) -> Iterator[Panel]:
    for kind in KINDS:
        for direction in DIRECTIONS:
            title = f"{_kind(kind)} gain, {direction}"
            yield from by_step(
                runs, look, gain_tag(kind, direction), f"gain_{kind}_{direction}", title,
                "largest over sub-layers", around=1.0,
            )  # fmt: skip


def _gains_by_layer(runs: Sequence[Run], look: dict[str, Look]) -> Iterator[Panel]:
    for kind in KINDS:
        for direction in DIRECTIONS:
            title = f"{_kind(kind)} gain, {direction}"
            yield from by_layer(
                runs, look, gain_tag(kind, direction), f"gain_{kind}_{direction}_by_layer", title,
                1.0,
            )  # fmt: skip


def _heat_maps(runs: Sequence[Run]) -> Iterator[Panel]:
    found = []
    for number, run in enumerate(runs):
        for kind in KINDS:
            for direction in reversed(DIRECTIONS):
                layers, steps, values = gains_by_layer(run.scalars, gain_tag(kind, direction))
                known = values[~np.isnan(values)]
                if len(known) and np.abs(known - 1).max() > AT_ONE:
                    found.append((number, run, kind, direction, layers, steps, values))
    if not found:
        return
    finite = np.concatenate([v[np.isfinite(v) & (v > 0)] for *_, v in found])
    limit = max(2.0, float(np.exp(np.abs(np.log(finite)).max()))) if len(finite) else 2.0
    for number, run, kind, direction, layers, steps, values in found:
        title = f"{run.name}: {_kind(kind).lower()}, {direction}"
        known = values[~np.isnan(values)]
        yield Panel(
            f"gain_{kind}_{direction}_over_time_{number}",
            title,
            f"{_kind(kind)} {direction} gain of {run.name} by sub-layer and step: between"
            f" {words.gain(float(known.min()))} and {words.gain(float(known.max()))}.",
            heat_map(layers, steps, values, limit, title),
        )


def _streams(runs: Sequence[Run], look: dict[str, Look]) -> Iterator[Panel]:
    chosen = [
        run
        for run in runs
        if not facts.has_one_stream(run)
        and any(
            run.scalars[tag].values.any()
            for tag in ("stream_diversity/mean", "sinkhorn_residual/column")
            if tag in run.scalars
        )
    ]
    yield from by_step(
        chosen, look, "stream_diversity/mean", "diversity", "Stream diversity",
        "mean of sub-layers", spread=False,
    )  # fmt: skip
    yield from by_layer(
        chosen, look, "stream_diversity", "diversity_by_layer", "Stream diversity, by sub-layer",
        None,
    )  # fmt: skip
    for side in ("column", "row"):
        yield from by_step(
            chosen, look, f"sinkhorn_residual/{side}", f"sinkhorn_{side}",
            f"Sinkhorn residual, {side}s", "largest distance of a sum from 1",
        )  # fmt: skip


def _kind(kind: str) -> str:
    return "Composite" if kind == "composite" else "Single-layer"
