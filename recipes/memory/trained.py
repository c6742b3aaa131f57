"""A variant with its runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gaps import Cost, Estimate, Measured, estimate
from parts import Variant
from scaling_results import described_values


@dataclass(frozen=True)
class Trained:
    """A variant with its runs.

    Attributes:
        variant: What was trained.
        cost: As `plan` counts it.
        runs: By seed.
        losses: The last validation loss by seed, of runs that ended with a finite one.
        gaps: The losses minus the baseline's of the same seed; empty for a baseline.
    """

    variant: Variant
    cost: Cost
    runs: dict[int, Measured]
    losses: dict[int, float]
    gaps: dict[int, float]

    @property
    def mean(self) -> float:
        """Mean loss over seeds."""
        return float(np.mean(list(self.losses.values())))

    @property
    def gap(self) -> Estimate | None:
        """Mean gap over seeds."""
        return estimate(self.gaps.values())

    @property
    def tokens(self) -> int:
        """Tokens that each run trained on."""
        run = next(iter(self.runs.values()))
        return run.max_steps * run.tokens_per_step

    def described(self) -> dict[str, Any]:
        """For the JSON."""
        found = {
            "variant": self.variant.name,
            "place": self.variant.place,
            "overrides": list(self.variant.overrides),
            "parameters": self.cost.parameters,
            "flops_per_token": self.cost.flops_per_token,
            "tokens": self.tokens,
            "flops": self.cost.flops_per_token * self.tokens,
            "loss": described_values(self.losses),
            "diverged_seeds": [seed for seed, run in self.runs.items() if run.diverged],
        }
        if self.variant.baseline is not None:
            found |= {"minus": self.variant.baseline, "gap": described_values(self.gaps)}
        return found


def with_gaps(
    variants: Sequence[Variant],
    costs: Sequence[Cost],
    runs: Sequence[dict[int, Measured]],
) -> list[Trained]:
    """Variants with their runs, in pairs with their baselines' of the same seed."""
    losses = {
        variant.name: {
            seed: run.losses[max(run.losses)] for seed, run in own.items() if _ended(run)
        }
        for variant, own in zip(variants, runs, strict=True)
    }
    found = []
    for variant, cost, own in zip(variants, costs, runs, strict=True):
        mine, theirs = losses[variant.name], losses.get(variant.baseline or "", {})
        gaps = {seed: loss - theirs[seed] for seed, loss in mine.items() if seed in theirs}
        found.append(Trained(variant, cost, own, mine, gaps))
    return found


def _ended(run: Measured) -> bool:
    return not run.diverged and run.max_steps in run.losses
