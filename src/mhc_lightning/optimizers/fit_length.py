"""The number of optimizer steps of a fit, which a schedule is spread over."""

import math
import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

UNKNOWN = sys.maxsize  # in place of a number of steps, until the training loader is there


def steps_of_fit(trainer: pl.Trainer) -> int:
    """The optimizer steps from the first step of a run to the end that a trainer's limits set.

    Lightning's own `estimated_stepping_batches` makes the loader ahead of time, which loses the
    position of a loader that resumes. Here the loader has to be there, as it is from the hook
    `on_train_start` on; before, or with a loader that has no length, only `max_steps` counts.

    Returns:
        The number; `UNKNOWN` if neither `max_steps` nor `max_epochs` with a loader limits the run.
    """
    by_steps = trainer.max_steps if trainer.max_steps >= 0 else UNKNOWN
    batches, epochs = trainer.fit_loop.max_batches, trainer.max_epochs
    if epochs is None or epochs < 0 or not 0 < batches < math.inf:
        return by_steps
    every = trainer.accumulate_grad_batches
    by_epochs = epochs * math.ceil(batches / every)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            sizes = map(callback.get_accumulate_grad_batches, range(epochs))
            by_epochs = sum(math.ceil(batches / size) for size in sizes)
    return min(by_steps, by_epochs)
