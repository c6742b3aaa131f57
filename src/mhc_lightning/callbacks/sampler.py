"""Sampling: what a watcher sees in the first micro-batch of every n-th optimizer step."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mhc_lightning.callbacks.every_n_steps import EveryNSteps, refuse_twice
from mhc_lightning.loggers.trainer_loggers import log_scalars
from mhc_lightning.strategies.layout import layout_of

Reduced = TypeVar("Reduced")


class Watcher(Protocol):
    """Watches the forward passes of a model between `open` and the end of a sample."""

    @property
    def is_open(self) -> bool:
        """True if hooks are installed."""
        ...

    def prepare(self, root: nn.Module) -> None:
        """Let compiled regions notice hooks, before the first forward pass."""
        ...

    def open(
        self, root: nn.Module, place: Callable[[], tuple[int, int] | None] | None = None
    ) -> None:
        """Install hooks; `place` gives (stage, micro-batch) of a running pass, in a pipeline."""
        ...

    def close(self) -> Any:
        """Remove the hooks, and return what was seen."""
        ...

    def release(self) -> None:
        """Remove all hooks, and restore what `prepare` has changed."""
        ...


class Sampler(pl.Callback, Generic[Reduced]):
    """Opens a watcher in the first micro-batch of every n-th optimizer step, and reports.

    A subclass implements `_close`. See `StreamSampler`, the base of instruments that watch streams.

    Args:
        every_n_steps: Optimizer steps between samples; None takes `log_intervals` times the
            trainer's `log_every_n_steps`.
        watcher: What watches.
        log_intervals: See `every_n_steps`.
        ends: See `StreamSampler`.

    Attributes:
        last: The last sample: its numbers by tag, and `step`, the optimizer steps completed.
            Empty before the first sample.

    Raises:
        UserError: `every_n_steps` is not a positive integer.
    """

    def __init__(
        self,
        every_n_steps: int | None,
        watcher: Watcher,
        *,
        log_intervals: int = 1,
        ends: bool = False,
    ) -> None:
        self.due_steps = EveryNSteps(
            every_n_steps, type(self).__name__, log_intervals=log_intervals, ends=ends
        )
        self.last: dict[str, float] = {}
        self._watcher = watcher
        self._step = 0
        self._reduced: Reduced | None = None

    def _close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Reduced | None:
        """Close the watcher, and compute the input of `report`, on the device; None for nothing.

        It runs without gradients. Under a pipeline all processes call it.
        """
        raise TypeError(f"{type(self).__name__} must define _close")

    def report(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, reduced: Reduced
    ) -> Mapping[str, float]:
        """Log a dictionary of scalar tensors by tag, read in one transfer, and return its numbers.

        Tags without `/layer_` also become `trainer.callback_metrics`. A subclass may override it.

        Args:
            trainer: The running trainer.
            pl_module: The module being trained.
            step: Optimizer steps completed, first 1.
            reduced: The result of `_close`.
        """
        sample: Any = reduced
        numbers = torch.stack([value.float() for value in sample.values()]).tolist()
        values = dict(zip(sample, numbers, strict=True))
        over_layers = [tag for tag in values if "/layer_" not in tag]
        log_scalars(trainer, pl_module, values, step, monitored=over_layers)
        return values

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let compiled regions notice hooks, if they hold a module to watch."""
        refuse_twice(trainer, self)
        self._watcher.prepare(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from where the run starts, or resumes."""
        self.due_steps.restart(trainer.global_step)
        self._reduced = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Install hooks if this micro-batch is the first of a step to sample."""
        self._watcher.close()  # a batch that the module skipped has no end hook
        step = trainer.global_step + 1
        if self.due_steps.is_due(trainer, step):
            self._step, self._reduced = step, None
            self._watcher.open(pl_module, layout_of(trainer.strategy).running_micro_batch)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Remove the hooks: the backward pass may replay forwards."""
        self._take_sample(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the sample once its optimizer step is complete."""
        self._take_sample(trainer, pl_module)
        if self._reduced is not None and trainer.global_step >= self._step:
            reduced, self._reduced = self._reduced, None
            values = self.report(trainer, pl_module, self._step, reduced)
            self.last = {**values, "step": self._step}

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Remove all hooks."""
        self._watcher.release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove all hooks."""
        self._watcher.release()

    def _take_sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._watcher.is_open:
            with torch.no_grad():
                self._reduced = self._close(trainer, pl_module)
