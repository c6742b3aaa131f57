"""The base class of instruments: callbacks that sample a model's stream mappings."""

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
from mhc_lightning.loggers.trainer_loggers import log_scalars
from mhc_lightning.strategies.layout import layout_of

Reduced = TypeVar("Reduced")


class StreamSampler(pl.Callback, Generic[Reduced]):
    """Samples the mappings of the first micro-batch of every n-th optimizer step.

    An instrument is a subclass in one file. It implements `reduce`, which computes its numbers
    from the mappings. An instrument that logs scalars needs nothing else:

    ```python
    import torch
    from torch import Tensor
    from mhc_lightning.callbacks import Observation, StreamSampler

    class LargestEntry(StreamSampler[dict[str, Tensor]]):
        \"\"\"Logs the largest entry of the residual matrices.\"\"\"

        def reduce(self, observations: list[Observation]) -> dict[str, Tensor]:
            by_layer = {
                f"largest_entry/layer_{o.layer}": o.mappings.residual.amax()  # [..., n, n] -> []
                for o in observations
            }
            return {"largest_entry/max": torch.stack(list(by_layer.values())).amax(), **by_layer}
    ```

    `trainer = Trainer(callbacks=[LargestEntry(every_n_steps=10)])` then logs the tags to all
    loggers, and in a configuration it is one more entry under `callbacks`.

    The methods of a subclass, in the order of the calls:

    - `note(module, args, output, mappings)`, optional: called for each sub-layer during the forward
      pass, without gradients, where the sub-layer's arguments are at hand. Its result becomes
      `Observation.note`. It serves values that are too large to keep, such as the streams.
    - `reduce(observations)`: called once per sample, before the backward pass, without gradients.
      It runs on the device and must not wait for it: no `.item()`, no `.tolist()`.
    - `report(trainer, pl_module, step, reduced)`, optional: called once the optimizer step is
      complete. By default it logs a dictionary of scalar tensors. An instrument that draws, or
      keeps more than numbers, overrides `report`, logs by `log_scalars` and `log_image`, and
      returns its numbers, which become `last`.

    A subclass with arguments of its own passes the others to `super().__init__`. A subclass that
    overrides a hook of Lightning calls the same hook of `StreamSampler`.

    **Cost.** Forward hooks exist from the start of the sampled micro-batch until its backward pass,
    and at no other time: validation, the sanity check, further micro-batches of the same step, the
    forward passes that activation checkpointing replays, and all other steps cost nothing.

    **Processes.** Every rank samples its own micro-batch, and loggers write rank zero's sample.
    Under a pipeline the micro-batch is the first that the stages pass on to each other, and every
    process has the sample of all stages.

    **Order.** Sub-layers are numbered in the order of the calls, through all forward passes of the
    sampled training step. `Observation.after` links them into chains by their streams: a sub-layer
    continues the chain whose output it reads. Two views of one network, a teacher and a student,
    or a generator and a critic are chains of their own; weights that are shared within a pass are
    in one chain. Links need a model that merges by `mhc_lightning.kernels`, records gradients, or
    passes streams from module to module. In any other model a new chain begins where a module is
    called again. Without gradients, a copy of the streams (on another device) begins a chain, too.
    Streams of zero tokens are left out.

    Args:
        every_n_steps: Optimizer steps between samples.
        extract: `(module, args, output) -> StreamMappings | None` for modules that do not return
            a `StreamMappings` themselves; None takes every module output that is one.
        log_intervals: The interval when `every_n_steps` is None, in units of the trainer's
            `log_every_n_steps`.
        ends: True samples the run's last step (`max_steps`) too and, at the default interval, the
            first step that Lightning logs.

    Attributes:
        last: The last sample: its numbers by tag, and `step`, the optimizer steps completed.
            Empty before the first sample.
        depth: The number of sub-layers in the sample that is being reduced, those without tokens
            included.

    Raises:
        UserError: `every_n_steps` is not a positive integer; at the first step, `extract` returned
            a value that is not a record of square matrices.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        extract: Extract | None = None,
        *,
        log_intervals: int = 1,
        ends: bool = False,
    ) -> None:
        self.due_steps = EveryNSteps(
            every_n_steps, type(self).__name__, log_intervals=log_intervals, ends=ends
        )
        self.last: dict[str, float] = {}
        self.depth = 0
        has_note = type(self).note is not StreamSampler.note
        self._watcher = StreamWatcher(extract, self.note if has_note else None)
        self._step = 0
        self._reduced: Reduced | None = None
        self._warned = False

    def note(
        self, module: nn.Module, args: tuple[Any, ...], output: Any, mappings: StreamMappings
    ) -> Any:
        """Look at one call during the forward pass, where its arguments are at hand.

        Args:
            module: The module that yielded the record.
            args: Its positional arguments, followed by the values of its keyword arguments.
            output: Its output.
            mappings: The record.

        Returns:
            A value for `Observation.note`.
        """
        return None

    def reduce(self, observations: list[Observation]) -> Reduced:
        """Compute from a sample the input of `report`, on the device and without waiting for it.

        Args:
            observations: The sub-layers in the order of their calls; at least one, each of at
                least one token.
        """
        raise TypeError(f"{type(self).__name__} must define reduce")

    def report(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, reduced: Reduced
    ) -> Mapping[str, float]:
        """Log a sample, and return its numbers by tag.

        The default logs a dictionary of scalar tensors by tag, read in one transfer. Tags without
        `/layer_` also become `trainer.callback_metrics`, for checkpoints and early stopping.

        Args:
            trainer: The running trainer.
            pl_module: The module being trained.
            step: Optimizer steps completed, first 1.
            reduced: The result of `reduce`.
        """
        if not isinstance(reduced, dict):
            raise TypeError(f"{type(self).__name__} must define report, or reduce to a dictionary")
        numbers = torch.stack([value.float() for value in reduced.values()]).tolist()
        values = dict(zip(reduced, numbers, strict=True))
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
