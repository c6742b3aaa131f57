"""What a page says in numbers: one record per run, and the runs compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mhc_lightning.errors import UserError
from mhc_lightning.reporting import run_description
from mhc_lightning.reporting.gain_extremes import DIRECTIONS, KINDS, GainRange, gain_range, gain_tag
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.metric_series import Series
from mhc_lightning.reporting.settings_comparison import same_batches, same_but_for_the_seed
from mhc_lightning.reporting.statistics import (
    Estimate,
    final_mean,
    lowest_mean,
    mean_interval,
)

LOSS, VALIDATION, GRADIENT = "train/loss", "val/loss", "train/grad_norm"
SPEED, MEMORY = "train/tokens_per_second", "train/peak_memory_bytes"
LIMIT = 2.0
"""Gains between 1 / `LIMIT` and `LIMIT` count as near 1."""
AT_ONE = 1e-4
"""Gains this near to 1 count as equal to it."""


@dataclass(frozen=True)
class GradientNorm:
    """Median and largest gradient norm before clipping, of the logged steps.

    Attributes:
        median: Of the finite ones.
        largest: Of them.
        step: Of the largest.
    """

    median: float
    largest: float
    step: int


@dataclass(frozen=True)
class Gap:
    """How far a run's loss is from a baseline's.

    Attributes:
        baseline: The other run's name.
        loss: The mean difference of the training losses at the same steps (run less baseline).
        validation: Step and difference of the last validation that both have.
        same_batches: Whether both saw the same sequences at each step; None where not known.
    """

    baseline: str
    loss: Estimate | None
    validation: tuple[int, float] | None
    same_batches: bool | None


@dataclass(frozen=True, eq=False)
class Summary:
    """A run in numbers; None wherever something was not logged.

    Attributes:
        run: What was read.
        ending: Word and sentence on how it ended.
        loss: Mean training loss over the final window.
        lowest: The lowest such mean of the run, with its first and last step.
        validation: Step and value of the last validation loss.
        gap: To the baseline; None for the baseline itself, too.
        gains: By tag, those that were logged.
        gradient: Gradient norm.
        speed: Median tokens per second.
        memory: The largest peak memory, in bytes.
        not_finite: First step at which the loss or its gradient was logged as NaN or infinite.
    """

    run: LoggedRun
    ending: tuple[str, str]
    loss: Estimate | None
    lowest: tuple[float, int, int] | None
    validation: tuple[int, float] | None
    gap: Gap | None
    gains: dict[str, GainRange]
    gradient: GradientNorm | None
    speed: float | None
    memory: float | None
    not_finite: tuple[int, str] | None


@dataclass(frozen=True)
class OverSeeds:
    """The gap of one kind of run over several seeds.

    Attributes:
        runs: Names, one per seed.
        baselines: Names of the baselines with the same seeds, in the same order.
        value: Mean gap of the training loss.
        low: Lower end of Student's 95% interval over the seeds.
        high: Upper end.
    """

    runs: list[str]
    baselines: list[str]
    value: float
    low: float
    high: float


def choose_baseline(runs: Sequence[LoggedRun], named: str | None) -> LoggedRun | None:
    """The run that the others are compared with.

    Args:
        runs: All of them.
        named: Its folder or its name on the page; None takes the first run with the ordinary
            residual connection, else the first run; with one run there is none.

    Raises:
        UserError: The named one is not among the runs.
    """
    if named is not None:
        place = Path(named).expanduser().resolve()
        for run in runs:
            if run.folder.resolve() == place or run.name == named:
                return run
        raise UserError(
            f"baseline={named} is not among the runs: {', '.join(str(r.folder) for r in runs)}"
        )
    if len(runs) < 2:
        return None
    return next((run for run in runs if run_description.has_one_stream(run)), runs[0])


def summarise(runs: Sequence[LoggedRun], baseline: LoggedRun | None) -> list[Summary]:
    """Every run in numbers, in the order given.

    Raises:
        UserError: A run and its baseline log the loss, but never at the same step.
    """
    return [_summarise(run, baseline_of(run, runs, baseline)) for run in runs]


def baseline_of(
    run: LoggedRun, runs: Sequence[LoggedRun], baseline: LoggedRun | None
) -> LoggedRun | None:
    """What a run is compared with: the baseline, or its twin that has the run's seed.

    Returns:
        None for the baseline and its twins.
    """
    if baseline is None or run is baseline:
        return None
    seed = run.setting("seed")
    if same_but_for_the_seed(run, baseline) and seed != baseline.setting("seed"):
        return None
    if seed == baseline.setting("seed"):
        return baseline
    for other in runs:
        if same_but_for_the_seed(other, baseline) and other.setting("seed") == seed:
            return other
    return baseline


def _summarise(run: LoggedRun, baseline: LoggedRun | None) -> Summary:
    scalars = run.scalars
    loss = scalars.get(LOSS)
    speed, memory = (_finite(run, tag) for tag in (SPEED, MEMORY))
    tags = [gain_tag(kind, direction) for kind in KINDS for direction in DIRECTIONS]
    ranges = {tag: gain_range(scalars, tag, LIMIT) for tag in tags}
    return Summary(
        run=run,
        ending=run_description.ending(run),
        loss=None if loss is None else final_mean(loss),
        lowest=None if loss is None else lowest_mean(loss),
        validation=_last(run),
        gap=None if baseline is None else gap(run, baseline),
        gains={tag: found for tag, found in ranges.items() if found is not None},
        gradient=_gradient(run),
        speed=None if speed is None else float(np.median(speed.values)),
        memory=None if memory is None else float(memory.values.max()),
        not_finite=_not_finite(run),
    )


def gap(run: LoggedRun, baseline: LoggedRun) -> Gap:
    """A run's loss less a baseline's, at the same steps.

    Raises:
        UserError: Both log the loss, but never at the same step.
    """
    estimate = None
    if LOSS in run.scalars and LOSS in baseline.scalars:
        differences = run.scalars[LOSS].minus(baseline.scalars[LOSS])
        if len(differences) == 0:
            raise UserError(
                f"{run.folder} and {baseline.folder} have no step with a {LOSS} in common;"
                " compare runs that log at the same steps, or report them one by one"
            )
        estimate = final_mean(differences)
    validation = None
    if VALIDATION in run.scalars and VALIDATION in baseline.scalars:
        both = run.scalars[VALIDATION].minus(baseline.scalars[VALIDATION])
        if len(both):
            validation = int(both.steps[-1]), float(both.values[-1])
    return Gap(baseline.name, estimate, validation, same_batches(run, baseline))


def over_seeds(summaries: Sequence[Summary]) -> list[OverSeeds]:
    """Gaps of runs that differ in their seed alone, each to a baseline of its own seed."""
    groups: list[list[Summary]] = []
    for summary in summaries:
        if summary.gap is None or summary.gap.loss is None:
            continue
        for group in groups:
            if same_but_for_the_seed(group[0].run, summary.run):
                group.append(summary)
                break
        else:
            groups.append([summary])
    found = []
    for group in groups:
        gaps = [s.gap for s in group if s.gap is not None and s.gap.loss is not None]
        baselines = [g.baseline for g in gaps]
        seeds = {s.run.setting("seed") for s in group}
        if len(gaps) > 1 and len(set(baselines)) == len(gaps) == len(seeds):
            values = [g.loss.value for g in gaps if g.loss is not None]
            names = [s.run.name for s in group]
            mean = float(np.mean(values))
            found.append(OverSeeds(names, baselines, mean, *mean_interval(values)))
    return found


def _last(run: LoggedRun) -> tuple[int, float] | None:
    series = run.scalars.get(VALIDATION)
    if series is None or len(series) == 0:
        return None
    return int(series.steps[-1]), float(series.values[-1])


def _finite(run: LoggedRun, tag: str) -> Series | None:
    """The values of a tag that are numbers, if there are any."""
    finite = run.scalars[tag].finite() if tag in run.scalars else None
    return finite if finite is not None and len(finite) else None


def _gradient(run: LoggedRun) -> GradientNorm | None:
    finite = _finite(run, GRADIENT)
    if finite is None:
        return None
    at = int(finite.values.argmax())
    return GradientNorm(
        float(np.median(finite.values)), float(finite.values[at]), int(finite.steps[at])
    )


def _not_finite(run: LoggedRun) -> tuple[int, str] | None:
    found = []
    for tag, name in ((LOSS, "training loss"), (GRADIENT, "gradient norm")):
        if tag in run.scalars:
            series = run.scalars[tag]
            lost = series.steps[~np.isfinite(series.values)]
            if len(lost):
                found.append((int(lost[0]), name))
    return min(found) if found else None
