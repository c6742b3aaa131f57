"""Stands between a module's gradients and the optimizer: may veto an update, or shorten it."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from mhc_lightning.errors import NonFiniteLossError


class UpdateGuard:
    """Decides about each optimizer step once its gradients are there, before weights change.

    Lightning calls no callback between gradient clipping, where modules log the norm, and the
    update. So two methods of the module are wrapped while a fit lasts: ``optimizer_step``, to have
    the learning rate of this one update multiplied (schedulers and checkpoints only ever see their
    own), and ``configure_gradient_clipping``, to take the gradients away after it. Without any,
    every optimizer of torch leaves weights, moments and their step counts as they are, and
    Lightning counts the step.

    Args:
        vetoes: ``(failure) -> bool``, called once per optimizer step after clipping; True skips the
            update. `failure` is the `NonFiniteLossError` that the module raised, or None; it is
            raised again if the update is not skipped.
        lr_scale: ``() -> float``, what to multiply the learning rates of this update by.
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
        own = {
            "optimizer_step": self._optimizer_step,
            "configure_gradient_clipping": self._configure_gradient_clipping,
        }
        self._before = {name: vars(module)[name] for name in own if name in vars(module)}
        vars(module).update(own)

    def remove(self) -> None:
        """Give the module its own methods back."""
        if self._module is not None:
            for name in ("optimizer_step", "configure_gradient_clipping"):
                del vars(self._module)[name]
            vars(self._module).update(self._before)
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
