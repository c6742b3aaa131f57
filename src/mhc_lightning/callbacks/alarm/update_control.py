"""Control over single optimizer updates: skip one, or lower its learning rate."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from mhc_lightning.errors import NonFiniteLossError, UserError

_MIN_SCALE = 0.1  # repeated lowering must not silently stop all learning


class UpdateGuard:
    """Decides on each optimizer step after its gradients are computed, before weights change.

    Lightning calls no callback between gradient clipping, where modules log the norm, and the
    update. So the guard wraps two methods of the module while a fit lasts. `optimizer_step` scales
    the learning rate of this one update (schedulers and checkpoints only see the unscaled rate).
    `configure_gradient_clipping` removes the gradients after clipping. Without gradients, every
    optimizer of torch leaves weights, moments and their step counts as they are, and Lightning
    counts the step.

    Args:
        vetoes: `(failure) -> bool`, called once per optimizer step after clipping; True skips the
            update. `failure` is the `NonFiniteLossError` that the module raised, or None; it is
            raised again if the update is not skipped.
        lr_scale: `() -> float`, the factor for the learning rates of this update.
    """

    def __init__(
        self,
        vetoes: Callable[[NonFiniteLossError | None], bool],
        lr_scale: Callable[[], float],
    ) -> None:
        self._vetoes = vetoes
        self._lr_scale = lr_scale
        self._module: pl.LightningModule | None = None

    def install(self, module: pl.LightningModule) -> None:
        """Wrap the module's methods."""
        self.remove()
        self._module = module
        self._step, self._clip = module.optimizer_step, module.configure_gradient_clipping
        wrappers = {
            "optimizer_step": self._optimizer_step,
            "configure_gradient_clipping": self._configure_gradient_clipping,
        }
        self._replaced = {name: vars(module)[name] for name in wrappers if name in vars(module)}
        vars(module).update(wrappers)

    def remove(self) -> None:
        """Restore the module's methods."""
        if self._module is not None:
            for name in ("optimizer_step", "configure_gradient_clipping"):
                del vars(self._module)[name]
            vars(self._module).update(self._replaced)
            self._module = None

    def _optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        scale = self._lr_scale()
        groups = optimizer.param_groups if scale != 1 else []
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * scale
        try:
            self._step(epoch, batch_idx, optimizer, *args, **kwargs)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        failure = None
        try:
            self._clip(optimizer, *args, **kwargs)
        except NonFiniteLossError as error:
            failure = error
        if self._vetoes(failure):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        elif failure is not None:
            raise failure


class LoweredRate:
    """A factor on the scheduled learning rate: 1 until `lower` is called.

    Each call multiplies the factor by `factor`, but never below 0.1. Afterwards the factor rises
    linearly to 1 within `recovery_steps` optimizer steps.

    Args:
        factor: Between 0 and 1.
        recovery_steps: At least 1; None never raises the factor again.

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
        """Set the factor to 1."""
        self._low, self._since = 1.0, 0

    def scale(self, step: int) -> float:
        """The factor for the update of optimizer step `step`, first 1."""
        if self.recovery_steps is None:
            return self._low
        recovered = min(1.0, (step - self._since) / self.recovery_steps)
        return self._low + (1 - self._low) * recovered

    def lower(self, step: int) -> None:
        """Lower the factor for the updates after that of `step`."""
        self._low, self._since = max(_MIN_SCALE, self.factor * self.scale(step)), step

    def __str__(self) -> str:
        """For people: `learning rate times 0.5, back within 1000 steps`."""
        back = "" if self.recovery_steps is None else f", back within {self.recovery_steps} steps"
        return f"learning rate times {self._low:.3g}{back}"

    def state_dict(self) -> dict[str, float | int]:
        """The lowest factor and the step since which it rises."""
        return {"low": self._low, "since": self._since}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Restore what `state_dict` gave."""
        self._low, self._since = state["low"], int(state["since"])
