"""The base class of instruments that sample a model's stream mappings."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from mhc_lightning.callbacks.sampler import Reduced, Sampler
from mhc_lightning.callbacks.watching.observations import Observation
from mhc_lightning.callbacks.watching.pipeline_stages import across_stages
from mhc_lightning.callbacks.watching.stream_watcher import Extract, StreamWatcher
from mhc_lightning.kernels import StreamMappings


class StreamSampler(Sampler[Reduced]):
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

    _watcher: StreamWatcher

    def __init__(
        self,
        every_n_steps: int | None = None,
        extract: Extract | None = None,
        *,
        log_intervals: int = 1,
        ends: bool = False,
    ) -> None:
        has_note = type(self).note is not StreamSampler.note
        self._watcher = StreamWatcher(extract, self.note if has_note else None)
        super().__init__(every_n_steps, self._watcher, log_intervals=log_intervals, ends=ends)
        self.depth = 0
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
        return super().report(trainer, pl_module, step, reduced)

    def _close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Reduced | None:
        observations = across_stages(trainer, self._watcher.close(), pl_module.device)
        self.depth = len(observations)
        with_tokens = [o for o in observations if o.mappings.residual.numel() > 0]
        if with_tokens:
            return self.reduce(with_tokens)
        if not observations and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{type(self).__name__} saw no StreamMappings in step {self._step}. It watches"
                " modules of the LightningModule whose output is a StreamMappings (every"
                " mhc_lightning connection has one); pass extract=... to watch other modules."
            )
        return None
