"""One connection at one depth in one precision: its runs at rising learning rates."""

import math
from dataclasses import dataclass, field

from outcome import Outcome, judge
from sweep import Run

from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.metric_series import Series

NO_SERIES = Series.of((), ())


@dataclass
class Cell:
    """One connection at one depth in one precision, and the outcomes of its runs.

    Attributes:
        connection: Of the configurations' group.
        depth: In blocks.
        precision: Of the trainer.
        outcomes: By learning rate.
        gains: The largest finite composite gains of those runs, forward and backward.
    """

    connection: str
    depth: int
    precision: str
    outcomes: dict[float, Outcome] = field(default_factory=dict)
    gains: dict[float, tuple[float | None, ...]] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """True if a run failed."""
        return any(not outcome.stable for outcome in self.outcomes.values())

    @property
    def largest_stable(self) -> float | None:
        """The last learning rate before the first failure; None if the first one failed."""
        last = None
        for rate, outcome in sorted(self.outcomes.items()):
            if not outcome.stable:
                break
            last = rate
        return last

    @property
    def first_failure(self) -> float | None:
        """The lowest learning rate that failed."""
        return min((r for r, outcome in self.outcomes.items() if not outcome.stable), default=None)

    @property
    def half_way(self) -> float | None:
        """The geometric mean of the largest stable learning rate and the first that failed."""
        last, first = self.largest_stable, self.first_failure
        return None if last is None or first is None else float(f"{math.sqrt(last * first):.3g}")

    def run(self, rate: float, config: str, overrides: tuple[str, ...]) -> Run:
        """The run at a learning rate."""
        own = (
            f"connection={self.connection}",
            f"model.num_layers={self.depth}",
            f"trainer.precision={self.precision}",
            f"optimizer.lr={rate:g}",
        )
        name = f"{self.connection}_{self.depth}_{self.precision}_{rate:g}"
        return Run(name, config, (*own, *overrides))

    def add(self, rate: float, run: LoggedRun | None, stopped: bool) -> None:
        """Add the outcome of a run that has ended; None if it logged nothing."""
        best = min((o.loss for r, o in self.outcomes.items() if r < rate), default=float("inf"))
        logged = {} if run is None else run.scalars
        self.outcomes[rate] = judge(logged.get("train/loss", NO_SERIES), stopped, best)
        forward, backward = (
            logged.get(f"amax_gain/composite/{side}", NO_SERIES).finite().values
            for side in ("forward", "backward")
        )
        self.gains[rate] = tuple(float(v.max()) if len(v) else None for v in (forward, backward))
