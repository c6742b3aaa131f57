"""The speed of training: tokens per second, and the share of the devices' peak FLOP/s.

Lightning's `ThroughputMonitor` waits for the device after every batch, multiplies by all ranks
(the stages of a pipeline share one batch), and counts the time of saving checkpoints. This
callback does none of these.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor

from mhc_lightning.callbacks.every_n_steps import EveryNSteps, refuse_twice
from mhc_lightning.errors import UserError
from mhc_lightning.loggers.trainer_loggers import log_scalars
from mhc_lightning.strategies.layout import layout_of


def count_batch_tokens(batch: Any) -> int:
    """The tokens of one batch, padding included, since padding takes its time too.

    An integer tensor [B, S + 1] holds B·S tokens (inputs and targets overlap). In a mapping every
    element of `input_ids` counts; in a sequence every element of its first item counts.

    Raises:
        UserError: The batch is none of these.
    """
    if _is_token_tensor(batch):
        return int(batch.shape[0] * (batch.shape[1] - 1))
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(batch, Sequence) and len(batch) > 0:
        tokens = batch[0]
    if isinstance(tokens, Tensor) and _is_token_tensor(tokens):
        return tokens.numel()
    raise UserError(
        f"Throughput cannot count the tokens of a batch of type {type(batch).__name__};"
        " give it count_tokens=..., a function from a batch to their number"
    )


def peak_device_flops(trainer: pl.Trainer) -> float | None:
    """Peak FLOP/s of one device at the trainer's precision.

    On CUDA it is the vendor's figure. A CPU has no such figure: there it is the measured speed of a
    large matrix product. None for other devices.
    """
    dtype = _compute_dtype(str(trainer.precision))
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return get_available_flops(device, dtype)
    return _measured_flops(device, dtype) if device.type == "cpu" else None


class Throughput(pl.Callback):
    """Logs `train/tokens_per_second` and, for models that count their FLOPs, `train/mfu`.

    Tokens are those of all data-parallel ranks. The time is that of training, with the waiting for
    data. Validation, saving checkpoints and the first step of a run (compilation, warm-up) are left
    out. A value is the average since the previous one; without trained tokens no value is logged.

    Model-FLOPs utilisation is `tokens/s · FLOPs per token / (devices · peak FLOP/s)`, with
    `pl_module.model.flops_per_token(sequence_length)` if it exists. On a CPU the peak is the speed
    of a matrix product, measured once at the start.

    Args:
        every_n_steps: Optimizer steps between values; None takes the trainer's
            `log_every_n_steps`.
        count_tokens: Tokens in one batch; None takes `count_batch_tokens`.
        peak_flops: Peak FLOP/s of one device; None looks it up.

    Attributes:
        last: The last values by tag, and `step`.
        total_tokens: Tokens trained on in this run, over all ranks.

    Raises:
        UserError: The interval is not a positive integer or, at the first batch, the tokens
            cannot be counted.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        count_tokens: Callable[[Any], int] | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self.due_steps = EveryNSteps(every_n_steps, "Throughput")
        self.count_tokens = count_tokens or count_batch_tokens
        self.peak_flops = peak_flops
        self.last: dict[str, float] = {}
        self.total_tokens = 0
        self._clock = _Clock()
        self._tokens = 0
        self._first_step = 1
        self._warm = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a trainer that has this callback twice."""
        refuse_twice(trainer, self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting, and look up the peak of the devices."""
        self.due_steps.restart(trainer.global_step)
        self.total_tokens = self._tokens = 0
        self._first_step, self._warm = trainer.global_step + 1, False
        self._clock = _Clock()
        if self.peak_flops is None and _flops_counter(pl_module) is not None:
            self.peak_flops = peak_device_flops(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the clock run again after a pause."""
        self._clock.run()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the batch, and log where a step is due."""
        shares = layout_of(trainer.strategy).data_parallel_size
        tokens = self.count_tokens(batch) * shares
        step = trainer.global_step
        self.total_tokens += tokens
        self._tokens += tokens
        due = self.due_steps.is_due(trainer, step)
        if not self._warm:
            self._warm = step >= self._first_step
            self._restart(trainer)
        elif due and self._tokens > 0:
            self._log(trainer, pl_module, batch, step)
            self._restart(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause: validation is not training."""
        self._pause(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Pause until the next batch: saving is not training, and no hook follows it."""
        self._pause(trainer)

    def _log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, step: int
    ) -> None:
        _synchronize(trainer)
        seconds = self._clock.seconds()
        if seconds <= 0:  # too short for the clock
            return
        speed = self._tokens / seconds
        values = {"train/tokens_per_second": speed}
        count_flops = _flops_counter(pl_module)
        if count_flops is not None and self.peak_flops and _is_token_tensor(batch):
            available = self.peak_flops * trainer.world_size
            values["train/mfu"] = speed * count_flops(batch.shape[1] - 1) / available
        log_scalars(trainer, pl_module, values, step, monitored=values)
        self.last = {**values, "step": step}

    def _restart(self, trainer: pl.Trainer) -> None:
        _synchronize(trainer)
        self._tokens = 0
        self._clock = _Clock()
        self._clock.run()

    def _pause(self, trainer: pl.Trainer) -> None:
        if self._clock.running:
            _synchronize(trainer)  # queued work counts as training
            self._clock.pause()


class _Clock:
    """Seconds, less those between `pause` and `run`."""

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._since: float | None = None

    @property
    def running(self) -> bool:
        return self._since is not None

    def run(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        self._elapsed, self._since = self.seconds(), None

    def seconds(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._elapsed + running


def _is_token_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _flops_counter(pl_module: pl.LightningModule) -> Callable[[int], int] | None:
    counter = getattr(getattr(pl_module, "model", None), "flops_per_token", None)
    return counter if callable(counter) else None


def _synchronize(trainer: pl.Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)


def _compute_dtype(precision: str) -> torch.dtype:
    for prefix, dtype in (
        ("bf16", torch.bfloat16),
        ("16", torch.float16),
        ("64", torch.float64),
    ):
        if precision.startswith(prefix):
            return dtype
    return torch.float32


def _measured_flops(device: torch.device, dtype: torch.dtype, size: int = 768) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)  # no random numbers: runs must repeat
    best = float("inf")
    for _ in range(4):  # the first is warm-up
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
