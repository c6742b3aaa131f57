"""The summary of a run, printed when it ends."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mhc_lightning.callbacks.amax_gain import AmaxGain
from mhc_lightning.callbacks.throughput import Throughput
from mhc_lightning.formatting import format_duration, format_gain
from mhc_lightning.loggers.trainer_loggers import is_tensorboard


class RunSummary(pl.Callback):
    """Prints final losses, the largest gains, tokens, time, and where the files are.

    Rank zero prints it in plain text when a fit ends without an exception. Losses and perplexity
    are `train/loss`, `val/loss` and `val/perplexity`, where the module logs them. Gains and tokens
    come from the `AmaxGain` and `Throughput` callbacks, where the trainer has them. They belong to
    this process: a resumed run counts from the step where it resumed.
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the time and the step."""
        self._started, self._first_step = time.monotonic(), trainer.global_step

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the summary."""
        if trainer.is_global_zero:
            rows = self.rows(trainer)
            width = max(len(name) for name, _ in rows)
            lines = [f"  {name:<{width}}  {text}" for name, text in rows]
            print("\n".join(["", "Run summary", *lines]), flush=True)

    def rows(self, trainer: pl.Trainer) -> list[tuple[str, str]]:
        """The summary as (name, text) pairs."""
        seconds = time.monotonic() - self._started
        steps = str(trainer.global_step)
        if self._first_step:
            steps += f" (resumed at {self._first_step})"
        rows = [("optimizer steps", steps)]
        for name, tag in (
            ("training loss", "train/loss"),
            ("validation loss", "val/loss"),
            ("validation perplexity", "val/perplexity"),
        ):
            if tag in trainer.callback_metrics:
                rows.append((name, f"{float(trainer.callback_metrics[tag]):.4f}"))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AmaxGain):
                rows += _gain_rows(callback)
            elif isinstance(callback, Throughput) and callback.total_tokens:
                rows += _token_rows(callback)
        rows.append(("training time", format_duration(seconds)))
        return rows + _file_rows(trainer)


def _gain_rows(callback: AmaxGain) -> list[tuple[str, str]]:
    rows = []
    for kind in ("composite", "single"):
        parts = [
            f"{direction} {format_gain(peak.value)} (sub-layer {peak.layer}, step {peak.step})"
            for direction in ("forward", "backward")
            if (peak := callback.peaks.get(f"amax_gain/{kind}/{direction}")) is not None
        ]
        if parts:
            rows.append((f"largest {kind} gain", ", ".join(parts)))
    return rows


def _token_rows(callback: Throughput) -> list[tuple[str, str]]:
    text = f"{callback.total_tokens:,}"
    speed, mfu = (callback.last.get(f"train/{tag}") for tag in ("tokens_per_second", "mfu"))
    if speed is not None:
        text += f", at the end {speed:,.0f} per second"
    if mfu is not None:
        text += f" ({100 * mfu:.1f} % model-FLOPs utilisation)"
    return [("tokens", text)]


def _file_rows(trainer: pl.Trainer) -> list[tuple[str, str]]:
    rows = []
    folders: list[str] = []
    events: list[str] = []
    for logger in trainer.loggers:
        folder: Any = getattr(logger, "log_dir", None) or logger.save_dir
        if folder and str(Path(folder)) not in folders:
            folders.append(str(Path(folder)))
        if folder and is_tensorboard(logger):
            events.append(str(Path(folder)))
    if folders:
        rows.append(("logs", ", ".join(folders)))
    checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
    if checkpoints and Path(checkpoints).is_dir():
        rows.append(("checkpoints", str(checkpoints)))
    if events:
        rows.append(("watch", f"tensorboard --logdir {events[0]}  (page /#custom_scalars)"))
    return rows
