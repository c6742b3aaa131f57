"""What must hold for a resumed run to go on exactly: the same stream, and batches counted alike."""

from collections.abc import Sequence
from typing import Any

import lightning as L

from mhc_lightning.data.prepared_data import PreparedData
from mhc_lightning.errors import UserError


def stream_identity(
    sources: Sequence[PreparedData],
    weights: Sequence[float],
    sequence_length: int,
    seed: int,
    shuffle_window: int,
) -> dict[str, Any]:
    """What the order of the training stream depends on; plain types, for checkpoints."""
    total = sum(weights)
    return {
        "tokenizer": sources[0].record.tokenizer["fingerprint"],
        "sequence_length": sequence_length,
        "seed": seed,
        "shuffle_window": shuffle_window,
        "sources": [
            [data.record.content, weight / total]
            for data, weight in zip(sources, weights, strict=True)
        ],
    }


def check_same_stream(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Compare a checkpoint's stream with the configured one.

    Raises:
        UserError: They differ.
    """
    changes = [
        key if key == "sources" else f"{key} was {saved.get(key)} and is {here[key]}"
        for key in here
        if saved.get(key) != here[key]
    ]
    if changes:
        raise UserError(
            f"the checkpoint was trained on other data ({', '.join(changes)}); use the data it was"
            " trained on, or say data.allow_data_change=true to go on with these"
        )


def align_batch_count(trainer: L.Trainer, accumulation: int) -> None:
    """Make a restored trainer count batches as if all its steps had been taken in today's batches.

    Lightning takes an optimizer step whenever its count of batches is a multiple of
    ``accumulate_grad_batches``. A checkpoint written between two steps, or with another number of
    accumulated batches, would therefore give a first step of too few batches. One written at the
    last batch of a run that is now made longer would begin another epoch.

    Args:
        trainer: The trainer, with its loops restored.
        accumulation: Batches per optimizer step now.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if trainer.global_step < trainer.max_steps:
        progress.is_last_batch = False
    excess = progress.total.ready - trainer.global_step * accumulation
    for tracker in (progress.total, progress.current):
        for name in ("ready", "started", "processed", "completed"):
            setattr(tracker, name, max(0, getattr(tracker, name) - excess))
