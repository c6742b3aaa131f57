"""When a callback samples: on which optimizer steps, counted as completed and first 1."""

import lightning.pytorch as pl

from mhc_lightning.errors import UserError


class EveryNSteps:
    """Every n-th optimizer step, seen from the first micro-batch of that step.

    Steps are `trainer.global_step` as it will be once the step is done, so the first is 1 and a
    step is due where Lightning's own ``log_every_n_steps`` would log it. Gradient accumulation
    (Lightning's, or a manual optimization that steps now and then) does not make a step due twice,
    and where one batch completes several optimizer steps the next batch makes up for a multiple
    of n that was jumped over.

    Args:
        every_n_steps: The interval in optimizer steps; None takes `log_intervals` times the
            trainer's ``log_every_n_steps``.
        owner: Who asks, for error messages.
        log_intervals: The default interval in units of ``log_every_n_steps``.
        ends: Whether the run's last step (``max_steps``) is due as well and, at the default
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
        whole = isinstance(every_n_steps, int) and not isinstance(every_n_steps, bool)
        if every_n_steps is not None and not (whole and every_n_steps >= 1):
            raise UserError(
                f"{owner}: every_n_steps is {every_n_steps!r}; give a positive number of optimizer"
                " steps, or None to follow trainer.log_every_n_steps"
            )
        self.every_n_steps = every_n_steps
        self.log_intervals = log_intervals
        self.ends = ends
        self._seen = 0
        self._waiting_for_first = ends and every_n_steps is None

    def interval(self, trainer: pl.Trainer) -> int:
        """The interval in optimizer steps; 0 where the trainer logs nothing."""
        if self.every_n_steps is not None:
            return self.every_n_steps
        return self.log_intervals * _logging_interval(trainer)

    def restart(self, step: int) -> None:
        """Begin (or resume) after `step` completed optimizer steps."""
        self._seen = step
        self._waiting_for_first = self.ends and self.every_n_steps is None

    def is_due(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether `step` is due; True only the first time it is asked about."""
        n, seen = self.interval(trainer), self._seen
        self._seen = max(step, seen)
        if n == 0 or step <= seen:
            return False
        due = step // n > seen // n or (self.ends and step == trainer.max_steps)
        if self._waiting_for_first:
            unit = _logging_interval(trainer)
            due = due or step // unit > seen // unit
            self._waiting_for_first = not due
        return due


def refuse_twice(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """See that a trainer has a callback once: called twice a step, it would measure wrongly.

    Raises:
        UserError: The same object is there twice.
    """
    if sum(other is callback for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        name = type(callback).__name__
        raise UserError(f"{name}: the trainer has the same callback twice; give it once")


def _logging_interval(trainer: pl.Trainer) -> int:
    return int(getattr(trainer, "log_every_n_steps", 0) or 0)
