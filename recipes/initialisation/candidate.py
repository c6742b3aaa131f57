"""One initialisation: its runs, and the numbers that candidates are compared by."""

from dataclasses import dataclass

import numpy as np

from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.metric_series import layer_matrix

DIVERSITY = "stream_diversity"
GAIN = "amax_gain/composite/backward"


@dataclass(frozen=True)
class Candidate:
    """One initialisation and its runs.

    Attributes:
        name: A key of `CANDIDATES`.
        runs: By seed; those whose loss stopped being finite are left out.
        diverged: The seeds that are left out.
    """

    name: str
    runs: dict[int, LoggedRun]
    diverged: list[int]

    def validation_losses(self) -> dict[int, float]:
        """The last validation loss of each seed."""
        return {s: float(r.scalars["val/loss"].values[-1]) for s, r in self.runs.items()}

    def diversity_by_step(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and diversity averaged over sub-layers (but the first) and seeds."""
        series = [run.scalars[f"{DIVERSITY}/mean"] for run in self.runs.values()]
        return series[0].steps, np.mean([one.values for one in series], axis=0)

    def diversity_by_layer(self) -> tuple[list[int], np.ndarray]:
        """Sub-layers, and their diversity at the end, averaged over seeds."""
        matrices = [layer_matrix(run.scalars, DIVERSITY) for run in self.runs.values()]
        return matrices[0][0], np.mean([values[:, -1] for _, _, values in matrices], axis=0)

    def largest_gain(self) -> float:
        """The largest composite backward gain of all seeds."""
        return max(float(run.scalars[GAIN].values.max()) for run in self.runs.values())

    def gaps(self, other: "Candidate") -> list[float]:
        """Its validation losses minus those of another one with the same seeds."""
        theirs = other.validation_losses()
        return [v - theirs[s] for s, v in self.validation_losses().items() if s in theirs]
