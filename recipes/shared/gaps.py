"""Validation losses of runs that differ in their connection, and their gaps to the baseline.

Losses are compared after the same optimizer steps, so after the same tokens in the same order, and
in pairs of the same seed. Intervals are Student's, at 95%, over seeds.
"""

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from mhc_lightning.reporting.statistics import mean_interval

BASELINE = "residual"


@dataclass(frozen=True)
class Measured:
    """The result of a run.

    Attributes:
        losses: Validation loss (nats per token) by optimizer steps completed; the finite ones.
        tokens_per_step: Tokens of an optimizer step.
        max_steps: Optimizer steps that were asked for.
        validation_tokens: On how many tokens it was validated at most; None for all held out.
        diverged: Whether its loss stopped being finite.
        folder: Where it wrote, if anywhere.
    """

    losses: dict[int, float]
    tokens_per_step: int
    max_steps: int
    validation_tokens: int | None = None
    diverged: bool = False
    folder: Path | None = None


def read_measured(folder: Path, diverged: bool) -> Measured:
    """Read a run that has ended.

    Args:
        folder: The run's.
        diverged: Whether `fit` ended it because its loss stopped being finite.

    Raises:
        SystemExit: It was never validated.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    data, table = config["data"], folder / "metrics.csv"
    logged: dict[int, float] = {}
    if table.is_file():  # one that diverged at its first step logged nothing
        with open(table, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("val/loss")]
        logged = {int(row["step"]): float(row["val/loss"]) for row in rows}
    losses = {step: loss for step, loss in logged.items() if math.isfinite(loss)}
    diverged = diverged or len(losses) < len(logged)
    if not losses and not diverged:
        raise SystemExit(
            f"error: the run in {folder} was never validated; set trainer.val_check_interval and"
            " trainer.limit_val_batches so that it is, and choose another output=FOLDER"
        )
    sequences, length = data["validation_sequences"], data["sequence_length"]
    return Measured(
        losses=losses,
        tokens_per_step=data["batch_size"] * length,
        max_steps=config["trainer"]["max_steps"],
        validation_tokens=None if sequences is None else sequences * length,
        diverged=diverged,
        folder=folder,
    )


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        low: Lower end of its interval; None for a single seed.
        high: Upper end.
    """

    mean: float
    low: float | None
    high: float | None

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """The interval in another unit; a falling function swaps its ends."""
        mean = function(self.mean)
        if self.low is None or self.high is None:
            return Estimate(mean, None, None)
        low, high = sorted([function(self.low), function(self.high)])
        return Estimate(mean, low, high)

    def text(self, form: str = "{:+.4f}") -> str:
        """The mean and its interval in brackets, each formatted by `form`."""
        mean = form.format(self.mean)
        if self.low is None or self.high is None:
            return mean
        return f"{mean} [{form.format(self.low)}, {form.format(self.high)}]"


def estimate(values: Iterable[float]) -> Estimate | None:
    """The mean of independent values with its interval; None of no values."""
    found = list(values)
    if not found:
        return None
    low, high = mean_interval(found) if len(found) > 1 else (None, None)
    return Estimate(float(np.mean(found)), low, high)


@dataclass(frozen=True)
class Cost:
    """The figures of `plan` for a model.

    Attributes:
        parameters: Their number by kind (``total``, ``active``, …).
        flops_per_token: Of training, forward and backward.
    """

    parameters: dict[str, int]
    flops_per_token: int


@dataclass(frozen=True)
class Point:
    """One connection, all seeds, after the same tokens.

    Attributes:
        member: The model's name.
        connection: The connection's.
        step: Optimizer steps completed.
        tokens: Tokens trained on.
        cost: Of the model.
        losses: Validation loss by seed.
        gaps: The loss minus the baseline's with the same seed, by seed.
        ratios: The loss in percent of the baseline's with the same seed, by seed.
        diverged: Seeds of which there is no loss, since the run diverged before.
    """

    member: str
    connection: str
    step: int
    tokens: int
    cost: Cost
    losses: dict[int, float]
    gaps: dict[int, float]
    ratios: dict[int, float]
    diverged: tuple[int, ...]

    @property
    def flops(self) -> float:
        """Training FLOPs so far, of one run."""
        return float(self.cost.flops_per_token * self.tokens)


Runs = Mapping[tuple[str, int], Measured]  # by connection and seed


def last_step(runs: Runs) -> int:
    """The last validation that every run reached which did not diverge."""
    ended = [run for run in runs.values() if not run.diverged]
    if not ended:
        return max(run.max_steps for run in runs.values())
    return min(max(run.losses) for run in ended)


def points_at(member: str, step: int, runs: Runs, costs: Mapping[str, Cost]) -> list[Point]:
    """A point for each connection, in the order of `costs`."""
    points = []
    for connection, cost in costs.items():
        own = {seed: run for (name, seed), run in runs.items() if name == connection}
        losses = {seed: run.losses[step] for seed, run in own.items() if step in run.losses}
        pairs = {
            seed: (loss, runs[BASELINE, seed].losses[step])
            for seed, loss in losses.items()
            if connection != BASELINE and step in runs[BASELINE, seed].losses
        }
        points.append(
            Point(
                member=member,
                connection=connection,
                step=step,
                tokens=step * next(iter(own.values())).tokens_per_step,
                cost=cost,
                losses=losses,
                gaps={seed: loss - base for seed, (loss, base) in pairs.items()},
                ratios={seed: 100 * loss / base for seed, (loss, base) in pairs.items()},
                diverged=tuple(s for s, run in own.items() if run.diverged and s not in losses),
            )
        )
    return points


@dataclass(frozen=True)
class Line:
    """A straight line in the logarithm of a size, fitted to each seed by least squares.

    Attributes:
        connection: Whose points.
        seeds: Those with a value at every point; the others are left out.
        points: How many points.
        first: The size (FLOPs, rows, …) of the first point.
        last: That of the last point.
        centre: Geometric mean of the points' sizes.
        value: The line at the centre.
        slope: Its rise per tenfold size.
        deviation: Root mean square of what the mean line leaves of the seeds' mean.
    """

    connection: str
    seeds: tuple[int, ...]
    points: int
    first: float
    last: float
    centre: float
    value: Estimate
    slope: Estimate
    deviation: float

    def at(self, size: float) -> float:
        """The mean line."""
        return self.value.mean + self.slope.mean * math.log10(size / self.centre)


def fit_line(
    points: Sequence[Point], values: Callable[[Point], Mapping[int, float]]
) -> Line | None:
    """Fit a quantity of one connection's points against their FLOPs; see `fit_logarithm`.

    Args:
        points: Those of one connection.
        values: The quantity, by seed.
    """
    if not points:
        return None
    sizes = [point.flops for point in points]
    return fit_logarithm(points[0].connection, sizes, [values(point) for point in points])


def fit_logarithm(
    name: str, sizes: Sequence[float], tables: Sequence[Mapping[int, float]]
) -> Line | None:
    """Fit a quantity against log10 of a size.

    Each seed has a line of its own; value and slope are means over seeds. So the intervals hold
    what seeds differ by, not that the truth may be no straight line.

    Args:
        name: Whose quantity it is.
        sizes: Of the points.
        tables: The quantity at each point, by seed.

    Returns:
        None where no seed has at least two points of different size, or one misses some.
    """
    seeds = [s for s in dict.fromkeys(s for t in tables for s in t) if all(s in t for t in tables)]
    across = np.log10(sizes)
    if not seeds or len(set(across)) < 2:
        return None
    centre = float(across.mean())
    table = np.array([[found[seed] for seed in seeds] for found in tables])  # [points, seeds]
    slopes, levels = np.polyfit(across - centre, table, 1)
    slope, value = estimate(slopes), estimate(levels)
    assert slope is not None and value is not None
    left = table.mean(1) - (value.mean + slope.mean * (across - centre))
    return Line(
        connection=name,
        seeds=tuple(seeds),
        points=len(sizes),
        first=sizes[0],
        last=sizes[-1],
        centre=10**centre,
        value=value,
        slope=slope,
        deviation=float(np.sqrt(np.mean(left**2))),
    )
