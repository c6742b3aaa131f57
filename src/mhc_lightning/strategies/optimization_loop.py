"""Lightning's optimization loop for training steps that run the backward pass themselves."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.optimization.automatic import (
    Closure,
    ClosureResult,
    _AutomaticOptimization,
)
from lightning.pytorch.trainer import call
from torch.optim import Optimizer


def run_backward_within_step(trainer: pl.Trainer) -> None:
    """Have a trainer expect that its training steps run the backward pass themselves."""
    loop = trainer.fit_loop.epoch_loop
    ours = _OptimizationAroundSchedule(trainer)
    ours.optim_progress = loop.automatic_optimization.optim_progress
    loop.automatic_optimization = ours


class _OptimizationAroundSchedule(_AutomaticOptimization):
    """Lightning's automatic optimization with `zero_grad` before the training step.

    Lightning's order is training step, `zero_grad`, backward pass.
    """

    def _make_closure(self, kwargs: Any, optimizer: Optimizer, batch_idx: int) -> Closure:
        zero_grad = self._make_zero_grad_fn(batch_idx, optimizer)
        step = self._make_step_fn(kwargs)
        return Closure(step_fn=lambda: self._step(zero_grad, step))

    def _step(
        self, zero_grad: Callable[[], None] | None, step: Callable[[], ClosureResult]
    ) -> ClosureResult:
        if zero_grad is not None:
            zero_grad()
        result = step()
        call._call_callback_hooks(self.trainer, "on_after_backward")
        call._call_lightning_module_hook(self.trainer, "on_after_backward")
        return result
