"""Lightning's loop counters, as a checkpoint at the end of an optimizer step needs them."""

import copy
from typing import Any

import lightning.pytorch as pl


def counters_at_step_end(loops: dict[str, Any], validation_pending: bool) -> dict[str, Any]:
    """A copy of the state of a trainer's loops that says "an optimizer step has just ended".

    Args:
        loops: The state, taken at the end of a step or within the validation after it.
        validation_pending: True for a copy that says "at the first batch of the step's validation"
            instead. Lightning then goes back to the start of that validation before it trains on.
    """
    loops = copy.deepcopy(loops)
    fit = loops["fit_loop"]
    training = fit["epoch_loop.batch_progress"]
    validation = fit["epoch_loop.val_loop.batch_progress"]
    training["is_last_batch"] = False  # a run may be made longer
    begun = int(validation_pending)
    for scope in ("total", "current"):
        validation[scope].update(ready=begun, started=begun, processed=0, completed=0)
        training[scope]["completed"] += begun
    return loops


def is_last_of_epochs(trainer: pl.Trainer) -> bool:
    """True at the last batch of a run whose length is a number of epochs."""
    loop = trainer.fit_loop
    epochs = -1 if loop.max_epochs is None else loop.max_epochs
    return loop.epoch_loop.batch_progress.is_last_batch and 0 < epochs <= trainer.current_epoch + 1
