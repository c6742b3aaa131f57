"""Exact resume: the position in the training stream, and the check that the stream is the same."""

from collections.abc import Sequence
from typing import Any

import lightning as L

from mhc_lightning.data.token_source import TokenSource
from mhc_lightning.errors import UserError


class StreamPosition:
    """Number of training sequences consumed, from the optimizer steps of a trainer.

    Args:
        batch_size: Sequences per optimizer step.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.reset()

    def reset(self) -> None:
        """Start at step 0, until a checkpoint is restored."""
        self._base_steps, self._base_sequences = 0, 0
        self._resumed = False

    def sequences(self, trainer: L.Trainer | None) -> int:
        """Sequences that the completed optimizer steps have consumed, over all ranks."""
        steps = self._base_steps if trainer is None else trainer.global_step
        return self._base_sequences + (steps - self._base_steps) * self.batch_size

    def begin(self, trainer: L.Trainer, accumulation: int) -> int:
        """The position of the next batch, when training begins or resumes.

        Args:
            trainer: The trainer, with its loops restored.
            accumulation: Micro-batches per optimizer step.
        """
        self.align(trainer, accumulation)
        self._resumed = False
        return self.sequences(trainer)

    def align(self, trainer: L.Trainer, accumulation: int) -> None:
        """Set a resumed trainer's counts as if all its steps had the current `accumulation`.

        Lightning takes an optimizer step whenever its count of batches is a multiple of
        `accumulate_grad_batches`. After a checkpoint written between two steps, or with another
        number of accumulated batches, the first step would therefore have too few batches. After
        a checkpoint written at the last batch of a run that is now longer, another epoch would
        begin.

        Args:
            trainer: The trainer, with its loops restored.
            accumulation: Current number of micro-batches per optimizer step.
        """
        if not self._resumed:
            return
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        if trainer.global_step < trainer.max_steps:
            progress.is_last_batch = False
        # A batch that was begun, and not processed, is begun again.
        excess = progress.total.processed - trainer.global_step * accumulation
        for tracker in (progress.total, progress.current):
            for name in ("ready", "started", "processed", "completed"):
                setattr(tracker, name, max(0, getattr(tracker, name) - excess))

    def state_dict(self, trainer: L.Trainer | None) -> dict[str, Any]:
        """The completed steps and the sequences that they consumed."""
        steps = self._base_steps if trainer is None else trainer.global_step
        return {"steps": steps, "sequences": self.sequences(trainer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a checkpoint's position; `batch_size` may differ from the checkpoint's."""
        self._base_steps, self._base_sequences = state["steps"], state["sequences"]
        self._resumed = True


def stream_identity(
    sources: Sequence[TokenSource],
    weights: Sequence[float],
    sequence_length: int,
    seed: int,
    shuffle_window: int,
    document_mask: bool,
) -> dict[str, Any]:
    """Everything that the training stream and its targets depend on; plain types."""
    total = sum(weights)
    return {
        "tokenizer": sources[0].tokenizer_fingerprint,
        "sequence_length": sequence_length,
        "seed": seed,
        "shuffle_window": shuffle_window,
        "document_mask": document_mask,
        "sources": [
            [data.content, weight / total] for data, weight in zip(sources, weights, strict=True)
        ],
    }


def check_same_stream(saved: dict[str, Any], configured: dict[str, Any]) -> None:
    """Compare the stream of a checkpoint with the configured one.

    Raises:
        UserError: They differ.
    """
    saved = {"document_mask": False, **saved}  # earlier versions had none
    changes = [
        key if key == "sources" else f"{key} was {saved.get(key)} and is {configured[key]}"
        for key in configured
        if saved.get(key) != configured[key]
    ]
    if changes:
        raise UserError(
            f"the checkpoint was trained on other data ({', '.join(changes)}); use the data it was"
            " trained on, or say data.allow_data_change=true to go on with these"
        )
