"""A learning rate that is lowered on top of its schedule, and comes back."""

from mhc_lightning.errors import UserError

_LEAST = 0.1  # repeated lowering must not end a training in silence


class LoweredRate:
    """What the schedule's learning rate is multiplied by: 1 until `lower` is called.

    Each call multiplies it by `factor`, down to 0.1 at the least; from there it rises linearly to
    1 within `recovery_steps` optimizer steps.

    Args:
        factor: Between 0 and 1.
        recovery_steps: At least 1; None leaves it down.

    Raises:
        UserError: A setting is out of range.
    """

    def __init__(self, factor: float, recovery_steps: int | None) -> None:
        if not 0 < factor < 1:
            raise UserError(f"StabilityAlarm: lr_factor is {factor}; give a number between 0 and 1")
        if recovery_steps is not None and recovery_steps < 1:
            raise UserError(
                f"StabilityAlarm: lr_recovery_steps is {recovery_steps}; give at least 1, or None"
                " to keep the learning rate down"
            )
        self.factor = factor
        self.recovery_steps = recovery_steps
        self.reset()

    def reset(self) -> None:
        """As the schedule has it."""
        self._low, self._since = 1.0, 0

    def scale(self, step: int) -> float:
        """The factor for the update of optimizer step `step`, first 1."""
        if self.recovery_steps is None:
            return self._low
        recovered = min(1.0, (step - self._since) / self.recovery_steps)
        return self._low + (1 - self._low) * recovered

    def lower(self, step: int) -> None:
        """Lower it for the updates after that of `step`."""
        self._low, self._since = max(_LEAST, self.factor * self.scale(step)), step

    def __str__(self) -> str:
        """For people: ``learning rate times 0.5, back within 1000 steps``."""
        back = "" if self.recovery_steps is None else f", back within {self.recovery_steps} steps"
        return f"learning rate times {self._low:.3g}{back}"

    def state_dict(self) -> dict[str, float | int]:
        """Where it is."""
        return {"low": self._low, "since": self._since}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on from there."""
        self._low, self._since = state["low"], int(state["since"])
