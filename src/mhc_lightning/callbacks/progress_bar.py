"""The progress of training: a bar on a terminal, plain lines anywhere else.

Lightning's `TQDMProgressBar` counts batches instead of optimizer steps, reads metrics from the
device at every refresh, and writes control characters into files. This bar does none of these.
"""

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from torch import Tensor
from tqdm import tqdm

from mhc_lightning.callbacks.amax_gain import AmaxGain
from mhc_lightning.callbacks.every_n_steps import EveryNSteps
from mhc_lightning.callbacks.throughput import Throughput
from mhc_lightning.formatting import format_gain

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_ENDLESS_BAR = "{desc} {n_fmt} [{elapsed}{postfix}]"


class ProgressBar(LightningProgressBar):
    """Optimizer steps done, loss, validation loss, tokens/s and the worst composite gain.

    On a terminal it is one bar over optimizer steps, with a second one during validation. In a file
    or a pipe it is one line per logging step, without control characters::

        step 50/200  loss 2.871  val loss 2.901  8,412 tokens/s  gain 1.02  00:31<01:33

    Speed and gain come from the `Throughput` and `AmaxGain` callbacks, if the trainer has them.
    Numbers are read on logging steps only, so that nothing waits for the device in between.

    Args:
        every_n_steps: Optimizer steps between updates of the numbers; None takes the trainer's
            `log_every_n_steps`.

    Attributes:
        reads_metrics_itself: Says that this bar needs no metric logged with `prog_bar=True`, whose
            value Lightning fetches from the device after every batch.

    Raises:
        UserError: The interval is not a positive integer.
    """

    reads_metrics_itself = True

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        self.due_steps = EveryNSteps(every_n_steps, "ProgressBar", ends=True)
        self._enabled = True
        self._bar: tqdm | None = None
        self._validation_bar: tqdm | None = None
        self._started = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without tearing the bar."""
        if self._bar is None:
            print(*args, **kwargs)
        else:
            tqdm.write(kwargs.get("sep", " ").join(map(str, args)), file=sys.stdout)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar at the step the run starts or resumes from."""
        self.due_steps.restart(trainer.global_step)
        self._started, self._first_step = time.monotonic(), trainer.global_step
        if self._enabled and _is_terminal():
            total = total_steps(trainer)
            self._bar = tqdm(
                desc="step",
                total=total,
                initial=trainer.global_step,
                bar_format=_ENDLESS_BAR if total is None else _BAR,
                dynamic_ncols=True,
                file=sys.stdout,
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move on; on a logging step, show the numbers."""
        if not self._enabled:
            return
        step = trainer.global_step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if self.due_steps.is_due(trainer, step):
            self._show(trainer, step, outputs)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar of a validation."""
        if self._enabled and _is_terminal():
            self._validation_bar = tqdm(
                desc="checking validation" if trainer.sanity_checking else "validation",
                total=_finite_sum(
                    trainer.num_sanity_val_batches
                    if trainer.sanity_checking
                    else trainer.num_val_batches
                ),
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}",
                dynamic_ncols=True,
                leave=False,
                position=0 if self._bar is None else 1,
                file=sys.stdout,
            )

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Move the validation's bar on."""
        if self._validation_bar is not None:
            self._validation_bar.update(1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the validation's bar, and show the validation loss."""
        if self._validation_bar is not None:
            self._validation_bar.close()
            self._validation_bar = None
        loss = _metric(trainer, "val/loss")
        if not self._enabled or trainer.sanity_checking or loss is None:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(self._numbers(trainer, None))
        else:
            step = f"step {trainer.global_step}  " if trainer.state.fn == "fit" else ""
            print(f"{step}validation loss {loss:.4f}", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the bars, so that the next output starts on a line of its own."""
        self._close()

    def _close(self) -> None:
        for bar in (self._validation_bar, self._bar):
            if bar is not None:
                bar.close()
        self._bar = self._validation_bar = None

    def _show(self, trainer: pl.Trainer, step: int, outputs: Any) -> None:
        numbers = self._numbers(trainer, outputs)
        if self._bar is not None:
            self._bar.set_postfix_str(numbers)
            return
        total = total_steps(trainer)
        elapsed = time.monotonic() - self._started
        progress = f"step {step}" if total is None else f"step {step}/{total}"
        clock = tqdm.format_interval(elapsed)
        if total is not None and step > self._first_step:
            remaining = elapsed * (total - step) / (step - self._first_step)
            clock += f"<{tqdm.format_interval(remaining)}"
        print("  ".join(filter(None, [progress, numbers, clock])), flush=True)

    def _numbers(self, trainer: pl.Trainer, outputs: Any) -> str:
        parts = []
        loss = _metric(trainer, "train/loss")
        if loss is None and isinstance(outputs, dict) and isinstance(outputs.get("loss"), Tensor):
            # Lightning has divided the loss for gradient accumulation.
            loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        validation = _metric(trainer, "val/loss")
        if validation is not None:
            parts.append(f"val loss {validation:.4f}")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput) and callback.last:
                parts.append(f"{callback.last['train/tokens_per_second']:,.0f} tokens/s")
            elif isinstance(callback, AmaxGain) and callback.last:
                parts.append(f"gain {format_gain(worst_composite_gain(callback.last))}")
        return "  ".join(parts)


def worst_composite_gain(last: dict[str, float]) -> float:
    """The larger of the composite gains in `AmaxGain.last`; NaN if one of them is."""
    gains = last["amax_gain/composite/forward"], last["amax_gain/composite/backward"]
    return math.nan if any(map(math.isnan, gains)) else max(gains)


def total_steps(trainer: pl.Trainer) -> int | None:
    """The optimizer step at which training ends, or None if it is not known."""
    limits: list[float] = [trainer.max_steps] if trainer.max_steps > 0 else []
    per_epoch = trainer.num_training_batches
    # Not trainer.estimated_stepping_batches: reading that loses a stateful loader's state.
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and per_epoch != float("inf"):
        limits.append(-(-per_epoch // trainer.accumulate_grad_batches) * trainer.max_epochs)
    return int(min(limits)) if limits else None


def _metric(trainer: pl.Trainer, tag: str) -> float | None:
    value = trainer.callback_metrics.get(tag)
    return None if value is None else float(value)


def _finite_sum(batches: Any) -> int | None:
    total = sum(batches) if isinstance(batches, list) else batches
    return None if total == float("inf") else int(total)


def _is_terminal() -> bool:
    return sys.stdout.isatty()
