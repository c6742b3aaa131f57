"""Baselines: the run that others are compared with, and the gaps of their losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mhc_lightning.errors import UserError
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.metric_series import LOSS, VALIDATION_LOSS
from mhc_lightning.reporting.run_description import has_one_stream, memory_name
from mhc_lightning.reporting.settings_comparison import same_batches, same_but_for_the_seed
from mhc_lightning.reporting.statistics import Estimate, final_mean, mean_interval


@dataclass(frozen=True)
class Gap:
    """The difference of a run's loss from a baseline's.

    Attributes:
        baseline: The baseline's name.
        loss: The mean difference of the training losses at the same steps (run less baseline).
        validation: Step and difference of the last validation that both have.
        same_batches: True if both saw the same sequences at each step; None where not known.
    """

    baseline: str
    loss: Estimate | None
    validation: tuple[int, float] | None
    same_batches: bool | None


@dataclass(frozen=True)
class GapOverSeeds:
    """The gap of runs that differ in their seed alone.

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
        runs: All runs.
        named: The baseline's folder, or its name on the page. None takes the first run with the
            ordinary residual connection, or else the first run, in both cases one without a memory
            if there is one; a single run has no baseline.

    Raises:
        UserError: The named run is not among the runs.
    """
    if named is not None:
        folder = Path(named).expanduser().resolve()
        for run in runs:
            if run.folder.resolve() == folder or run.name == named:
                return run
        raise UserError(
            f"baseline={named} is not among the runs: {', '.join(str(r.folder) for r in runs)}"
        )
    if len(runs) < 2:
        return None
    residual = [run for run in runs if has_one_stream(run)] or list(runs)
    return next((run for run in residual if memory_name(run) == "none"), residual[0])


def baseline_of(
    run: LoggedRun, runs: Sequence[LoggedRun], baseline: LoggedRun | None
) -> LoggedRun | None:
    """The baseline of one run: the baseline's copy with this run's seed, or else the baseline.

    Returns:
        None for the baseline itself and for its copies with other seeds.
    """
    if baseline is None or run is baseline:
        return None
    seed = run.setting("seed")
    if seed == baseline.setting("seed"):
        return baseline
    if same_but_for_the_seed(run, baseline):
        return None
    for other in runs:
        if same_but_for_the_seed(other, baseline) and other.setting("seed") == seed:
            return other
    return baseline


def gap(run: LoggedRun, baseline: LoggedRun) -> Gap:
    """A run's loss less a baseline's, at the same steps.

    Raises:
        UserError: Both log the loss, but never at the same step.
    """
    loss = None
    if LOSS in run.scalars and LOSS in baseline.scalars:
        differences = run.scalars[LOSS].minus(baseline.scalars[LOSS])
        if len(differences) == 0:
            raise UserError(
                f"{run.folder} and {baseline.folder} have no step with a {LOSS} in common;"
                " compare runs that log at the same steps, or report them one by one"
            )
        loss = final_mean(differences)
    validation = None
    if VALIDATION_LOSS in run.scalars and VALIDATION_LOSS in baseline.scalars:
        differences = run.scalars[VALIDATION_LOSS].minus(baseline.scalars[VALIDATION_LOSS])
        if len(differences):
            validation = int(differences.steps[-1]), float(differences.values[-1])
    return Gap(baseline.name, loss, validation, same_batches(run, baseline))


def gaps_over_seeds(pairs: Sequence[tuple[LoggedRun, Gap | None]]) -> list[GapOverSeeds]:
    """Gaps of runs that differ in their seed alone, each to a baseline of its own seed.

    Args:
        pairs: Runs and their gaps.
    """
    groups: list[list[tuple[LoggedRun, Gap, float]]] = []
    for run, run_gap in pairs:
        if run_gap is None or run_gap.loss is None:
            continue
        member = (run, run_gap, run_gap.loss.value)
        for group in groups:
            if same_but_for_the_seed(group[0][0], run):
                group.append(member)
                break
        else:
            groups.append([member])
    over_seeds = []
    for group in groups:
        runs, gaps, values = zip(*group, strict=True)
        baselines = [each.baseline for each in gaps]
        num_seeds = len({run.setting("seed") for run in runs})
        if len(group) > 1 and len(group) == num_seeds == len(set(baselines)):
            names = [run.name for run in runs]
            mean, interval = float(np.mean(values)), mean_interval(values)
            over_seeds.append(GapOverSeeds(names, baselines, mean, *interval))
    return over_seeds
