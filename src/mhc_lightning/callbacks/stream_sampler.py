"""The common base of callbacks that sample a model's stream mappings now and then."""

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from mhc_lightning.callbacks.every_n_steps import EveryNSteps, refuse_twice
from mhc_lightning.callbacks.watching.observations import Observation
from mhc_lightning.callbacks.watching.pipeline_stages import across_stages
from mhc_lightning.callbacks.watching.stream_watcher import Extract, StreamWatcher
from mhc_lightning.kernels import StreamMappings
from mhc_lightning.strategies.layout import layout_of

Reduced = TypeVar("Reduced")


class StreamSampler(pl.Callback, Generic[Reduced]):
    """Samples the mappings of the first micro-batch of every n-th optimizer step.

    Forward hooks exist from the start of that micro-batch until its backward pass, and at no other
    time: validation, the sanity check, further micro-batches of the same step, the forward passes
    that activation checkpointing replays, and all other steps cost nothing. A sample is reduced on
    the device before the backward pass and read once the optimizer step is complete, so that its
    step is the one that loggers show for the training loss. Every rank samples its own
    micro-batch; what is logged is rank zero's.

    Under a pipeline the micro-batch is the first that its stages pass on to each other, and every
    process has the sample of all stages.

    Sub-layers are numbered in the order of the calls, through all forward passes of that one
    training step. What each comes after is told by the streams: a sub-layer continues the chain
    whose output it reads, so that two views of one network, a teacher and a student, or generator
    and critic are chains of their own, and weights that are shared within a pass are in one. In a
    model that neither merges by `mhc_lightning.kernels` nor records gradients nor hands streams
    from module to module, a new chain begins where a module is met again. Without gradients a copy
    of the streams (on another device) begins one too; streams of zero tokens are left out.

    Subclasses implement `reduce` and `report`, and may implement `note`.

    Args:
        every_n_steps: Optimizer steps between samples.
        extract: ``(module, args, output) -> StreamMappings | None`` for modules that do not return
            a `StreamMappings` themselves; None takes every module output that is one.
        log_intervals: The interval when `every_n_steps` is None, in units of the trainer's
            ``log_every_n_steps``.
        ends: Whether to sample the run's last step (``max_steps``) too and, at the default
            interval, the first step that Lightning logs.

    Attributes:
        last: The last sample: its numbers by tag, and ``step``, the optimizer steps completed.
            Empty before the first sample.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        extract: Extract | None = None,
        *,
        log_intervals: int = 1,
        ends: bool = False,
    ) -> None:
        self.schedule = EveryNSteps(
            every_n_steps, type(self).__name__, log_intervals=log_intervals, ends=ends
        )
        self.last: dict[str, float] = {}
        self.depth = 0  # sub-layers of the sample that is reduced, those without tokens included
        self._watcher = StreamWatcher(extract, self.note if self.takes_notes else None)
        self._step = 0
        self._reduced: Reduced | None = None
        self._warned = False

    takes_notes = False
    """Whether the subclass implements `note`."""

    def note(
        self, module: nn.Module, args: tuple[Any, ...], output: Any, mappings: StreamMappings
    ) -> Any:
        """Look at one call during the forward pass, where its arguments are still at hand."""
        return None

    def reduce(self, observations: list[Observation]) -> Reduced:
        """Boil a sample down to what `report` needs, on the device and without waiting for it.

        Args:
            observations: At least one, each of at least one token.
        """
        raise TypeError(f"{type(self).__name__} must define reduce")

    def report(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, reduced: Reduced
    ) -> Mapping[str, float]:
        """Log a sample, and return its numbers by tag."""
        raise TypeError(f"{type(self).__name__} must define report")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have compiled regions heed hooks, if they hold anything to watch."""
        refuse_twice(trainer, self)
        self._watcher.prepare(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from where the run starts, or resumes."""
        self.schedule.restart(trainer.global_step)
        self._reduced = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the window if this micro-batch is the first of a step to sample."""
        self._watcher.close()  # a batch that the module skipped never ended
        step = trainer.global_step + 1
        if self.schedule.is_due(trainer, step):
            self._step, self._reduced = step, None
            self._watcher.open(pl_module, layout_of(trainer.strategy).running_micro_batch)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Close the window: the backward pass may replay forwards."""
        self._take(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the sample once its optimizer step is complete."""
        self._take(trainer, pl_module)
        if self._reduced is not None and trainer.global_step >= self._step:
            reduced, self._reduced = self._reduced, None
            values = self.report(trainer, pl_module, self._step, reduced)
            self.last = {**values, "step": self._step}

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook behind."""
        self._watcher.release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._watcher.release()

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._watcher.is_open:
            return
        observations = across_stages(trainer, self._watcher.close(), pl_module.device)
        self.depth = len(observations)
        with_tokens = [o for o in observations if o.mappings.residual.numel() > 0]
        if with_tokens:
            with torch.no_grad():
                self._reduced = self.reduce(with_tokens)
        elif not observations and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{type(self).__name__} saw no StreamMappings in step {self._step}. It watches"
                " modules of the LightningModule whose output is a StreamMappings (every"
                " mhc_lightning connection has one); pass extract=... to watch other modules."
            )
