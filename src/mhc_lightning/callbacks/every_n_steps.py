"""The optimizer steps at which a callback acts: every n-th, counted as completed, first 1."""

import lightning.pytorch as pl

from mhc_lightning.errors import UserError


class EveryNSteps:
    """Every n-th optimizer step, known from the first micro-batch of that step on.

    A step's number is `trainer.global_step` once the step is complete, so the first is 1. A step
    is due where Lightning's own `log_every_n_steps` logs it. Gradient accumulation (Lightning's, or
    a manual optimization that does not step in every batch) does not make a step due twice. Where
    one batch completes several optimizer steps, a skipped multiple of n is due at the next batch.

    Args:
        every_n_steps: The interval in optimizer steps; None takes `log_intervals` times the
            trainer's `log_every_n_steps`.
        owner: Name of the callback, for error messages.
        log_intervals: The default interval in units of `log_every_n_steps`.
        ends: True makes the run's last step (`max_steps`) due as well and, at the default
            interval, the first step that Lightning logs.

    Raises:
        UserError: `every_n_steps` is neither None nor a positive integer.
    """

    def __init__(
        self,
        every_n_steps: int | None,
        owner: str,
        *,
        log_intervals: int = 1,
        ends: bool = False,
    ) -> None:
        is_integer = isinstance(every_n_steps, int) and not isinstance(every_n_steps, bool)
        if every_n_steps is not None and not (is_integer and every_n_steps >= 1):
            raise UserError(
                f"{owner}: every_n_steps is {every_n_steps!r}; give a positive number of optimizer"
                " steps, or None to follow trainer.log_every_n_steps"
            )
        self.every_n_steps = every_n_steps
        self.log_intervals = log_intervals
        self.ends = ends
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin, or resume, after `step` completed optimizer steps."""
        self._last_asked = step
        self._waits_for_first = self.ends and self.every_n_steps is None

    def is_due(self, trainer: pl.Trainer, step: int) -> bool:
        """True if `step` is due and is asked about for the first time."""
        last, self._last_asked = self._last_asked, max(step, self._last_asked)
        logging_interval = int(getattr(trainer, "log_every_n_steps", 0) or 0)
        interval = self.every_n_steps or self.log_intervals * logging_interval
        if interval == 0 or step <= last:  # 0: the trainer logs nothing
            return False
        due = step // interval > last // interval or (self.ends and step == trainer.max_steps)
        if self._waits_for_first:
            due = due or step // logging_interval > last // logging_interval
            self._waits_for_first = not due
        return due


def refuse_twice(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Refuse a trainer that has a callback twice: two calls per step would measure wrongly.

    Raises:
        UserError: The trainer has the same object twice.
    """
    if sum(other is callback for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        name = type(callback).__name__
        raise UserError(f"{name}: the trainer has the same callback twice; give it once")
