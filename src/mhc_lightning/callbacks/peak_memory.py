"""The callback that logs the peak memory of a run so far."""

from typing import Any

import lightning.pytorch as pl
import torch

from mhc_lightning.callbacks.every_n_steps import EveryNSteps
from mhc_lightning.callbacks.process_memory import peak_resident_bytes
from mhc_lightning.loggers.trainer_loggers import log_scalars

PEAK_MEMORY = "train/peak_memory_bytes"


def peak_memory(device: torch.device) -> int | None:
    """The largest number of bytes that this process has held at once; None if it is not known.

    On CUDA this is the memory that torch had allocated on `device` (without the caching allocator's
    reserve). On a CPU it is the process's resident memory, loaded libraries included.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident_bytes() if device.type == "cpu" else None


class PeakMemory(pl.Callback):
    """Logs `train/peak_memory_bytes` of the first process and its device; see `peak_memory`.

    Args:
        every_n_steps: Optimizer steps between values; None takes the trainer's
            `log_every_n_steps`.

    Raises:
        UserError: The interval is not a positive integer.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.due_steps = EveryNSteps(every_n_steps, "PeakMemory")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from where the run starts, or resumes."""
        self.due_steps.restart(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log where a step is due."""
        step = trainer.global_step
        if not self.due_steps.is_due(trainer, step):
            return
        peak = peak_memory(trainer.strategy.root_device)
        if peak is not None:
            log_scalars(trainer, pl_module, {PEAK_MEMORY: float(peak)}, step)
