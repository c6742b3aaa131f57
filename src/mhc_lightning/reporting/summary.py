"""Summaries: each run in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mhc_lightning.reporting.baselines import Gap, baseline_of, gap
from mhc_lightning.reporting.gain_extremes import (
    DIRECTIONS,
    KINDS,
    GainRange,
    gain_range,
    gain_tag,
)
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.memory_summary import MemorySummary, memory_summary
from mhc_lightning.reporting.metric_series import (
    GRADIENT_NORM,
    LOSS,
    MEMORY,
    SPEED,
    VALIDATION_LOSS,
    Series,
)
from mhc_lightning.reporting.run_description import Ending, ending
from mhc_lightning.reporting.statistics import Estimate, LowestMean, final_mean, lowest_mean

LIMIT = 2.0
"""Gains between 1 / `LIMIT` and `LIMIT` count as near 1."""
AT_ONE = 1e-4
"""Gains this near to 1 count as equal to it."""


@dataclass(frozen=True)
class GradientNorm:
    """Median and largest gradient norm before clipping, of the logged steps.

    Attributes:
        median: The median of the finite norms.
        largest: The largest of them.
        step: The step of the largest.
    """

    median: float
    largest: float
    step: int


@dataclass(frozen=True, eq=False)
class Summary:
    """A run in numbers; None where a metric was not logged.

    Attributes:
        run: The run.
        ending: Its end.
        loss: Mean training loss over the final window.
        lowest: The lowest mean over a stretch as long as the final window.
        validation: Step and value of the last validation loss.
        gap: The gap to its baseline; None for the baseline itself, too.
        gains: The logged gains, by tag.
        gradient: Gradient norm.
        speed: Median tokens per second.
        memory: The largest peak memory, in bytes.
        ngrams: Its memory of n-grams, if it has logged one.
        not_finite: First step at which a metric was NaN or infinite, and the metric's name.
    """

    run: LoggedRun
    ending: Ending
    loss: Estimate | None
    lowest: LowestMean | None
    validation: tuple[int, float] | None
    gap: Gap | None
    gains: dict[str, GainRange]
    gradient: GradientNorm | None
    speed: float | None
    memory: float | None
    ngrams: MemorySummary | None
    not_finite: tuple[int, str] | None


def summarise(runs: Sequence[LoggedRun], baseline: LoggedRun | None) -> list[Summary]:
    """Every run in numbers, in the order given.

    Raises:
        UserError: A run and its baseline log the loss, but never at the same step.
    """
    return [_summarise(run, baseline_of(run, runs, baseline)) for run in runs]


def _summarise(run: LoggedRun, baseline: LoggedRun | None) -> Summary:
    loss = run.scalars.get(LOSS)
    speed, memory = (_finite(run, tag) for tag in (SPEED, MEMORY))
    tags = [gain_tag(kind, direction) for kind in KINDS for direction in DIRECTIONS]
    ranges = {tag: gain_range(run.scalars, tag, LIMIT) for tag in tags}
    return Summary(
        run=run,
        ending=ending(run),
        loss=None if loss is None else final_mean(loss),
        lowest=None if loss is None else lowest_mean(loss),
        validation=_last_validation(run),
        gap=None if baseline is None else gap(run, baseline),
        gains={tag: gains for tag, gains in ranges.items() if gains is not None},
        gradient=_gradient_norm(run),
        speed=None if speed is None else float(np.median(speed.values)),
        memory=None if memory is None else float(memory.values.max()),
        ngrams=memory_summary(run.scalars),
        not_finite=_first_not_finite(run),
    )


def _last_validation(run: LoggedRun) -> tuple[int, float] | None:
    series = run.scalars.get(VALIDATION_LOSS)
    if series is None or len(series) == 0:
        return None
    return int(series.steps[-1]), float(series.values[-1])


def _finite(run: LoggedRun, tag: str) -> Series | None:
    """The finite values of a tag, if there are any."""
    finite = run.scalars[tag].finite() if tag in run.scalars else None
    return finite if finite is not None and len(finite) else None


def _gradient_norm(run: LoggedRun) -> GradientNorm | None:
    finite = _finite(run, GRADIENT_NORM)
    if finite is None:
        return None
    largest = int(finite.values.argmax())
    return GradientNorm(
        float(np.median(finite.values)), float(finite.values[largest]), int(finite.steps[largest])
    )


def _first_not_finite(run: LoggedRun) -> tuple[int, str] | None:
    first = []
    for tag, name in ((LOSS, "training loss"), (GRADIENT_NORM, "gradient norm")):
        if tag in run.scalars:
            series = run.scalars[tag]
            steps = series.steps[~np.isfinite(series.values)]
            if len(steps):
                first.append((int(steps[0]), name))
    return min(first) if first else None
