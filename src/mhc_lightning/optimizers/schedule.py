"""The learning rate of every optimizer step: a warm-up, then steps, a cosine or a constant."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mhc_lightning.errors import UserError

ScheduleName = Literal["step", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over the optimizer steps of a run, relative to the peak learning rate.

    Attributes:
        name: After the warm-up, `step` multiplies the peak by 0.316 from 80% and by 0.1 from 90%
            of all steps on; `cosine` falls to `final_fraction` of it; `constant` keeps it.
        warmup_steps: Steps over which the learning rate rises linearly from 0 to the peak.
        final_fraction: The end of `cosine`, as a fraction of the peak.

    Raises:
        UserError: A value is out of range.
    """

    name: ScheduleName
    warmup_steps: int
    final_fraction: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.final_fraction < math.inf:
            raise UserError(
                f"optimizer.final_fraction must be at least 0, not {self.final_fraction}"
            )
        if self.warmup_steps < 0:
            raise UserError(f"optimizer.warmup_steps must be at least 0, not {self.warmup_steps}")
        if self.name not in ("step", "cosine", "constant"):
            raise UserError(
                f"optimizer.schedule must be step, cosine or constant, not {self.name!r}"
            )

    def factor(self, step: int, total_steps: int) -> float:
        """The factor on the peak learning rate for the step that follows `step` completed ones."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "step":
            # Integers are compared, so that no milestone depends on rounding.
            if 10 * step >= 9 * total_steps:
                return 0.1
            return 0.316 if 10 * step >= 8 * total_steps else 1.0
        if self.name == "cosine":
            span = max(1, total_steps - self.warmup_steps)
            progress = min(1.0, (step - self.warmup_steps) / span)
            swing = 0.5 * (1 + math.cos(math.pi * progress))
            return self.final_fraction + (1 - self.final_fraction) * swing
        return 1.0

    def scheduler(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """A scheduler of the optimizer's learning rates, to be stepped once per optimizer step."""
        # A partial function saves nothing of the schedule: a resumed run follows its own.
        return _LambdaLR(optimizer, partial(self.factor, total_steps=total_steps))

    def spread(self, scheduler: LambdaLR, total_steps: int) -> None:
        """Give a scheduler of this schedule another number of steps, from the next step on."""
        for k, _ in enumerate(scheduler.lr_lambdas):
            scheduler.lr_lambdas[k] = partial(self.factor, total_steps=total_steps)


class _LambdaLR(LambdaLR):
    """A `LambdaLR` that leaves groups alone which are added later, as finetuning callbacks do."""

    def get_lr(self) -> list[Any]:
        added = self.optimizer.param_groups[len(self.base_lrs) :]
        return [*super().get_lr(), *(group["lr"] for group in added)]


def follow_present_schedule(
    optimizer: Optimizer, scheduler: LambdaLR, num_groups: int
) -> tuple[float, float] | None:
    """Replace the loaded learning rates by those of the present schedule.

    Args:
        optimizer: The optimizer, whose groups' `initial_lr` are the present peak learning rates.
        scheduler: The optimizer's scheduler, with its count of steps loaded.
        num_groups: Number of the optimizer's groups, from the first, that follow the schedule.

    Returns:
        The loaded and the present learning rate of the first group in which they differ, or None.
    """
    changed = None
    for k, group in enumerate(optimizer.param_groups[:num_groups]):
        scheduler.base_lrs[k] = group["initial_lr"]
        loaded = group["lr"]
        group["lr"] = group["initial_lr"] * scheduler.lr_lambdas[k](scheduler.last_epoch)
        if loaded != group["lr"] and changed is None:
            changed = loaded, group["lr"]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    return changed
