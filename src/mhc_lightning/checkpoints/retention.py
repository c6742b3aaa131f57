"""Retention: which checkpoints to keep (newest, at round steps, best), and deleting the others."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mhc_lightning.checkpoints.names import checkpoints_of, saved_steps
from mhc_lightning.errors import UserError
from mhc_lightning.files.atomic import ASIDE, remove


class Retention:
    """Decides which checkpoints may be deleted.

    Args:
        keep_last: Number of the newest checkpoints to keep; None keeps all.
        keep_every: Keep for good the checkpoints at multiples of this many steps.
        keep_best: Number of the best checkpoints to keep, by their score.
        monitor: The metric whose values are the scores.
        mode: `min` if a lower score is better, else `max`.

    Attributes:
        scores: Scores of the best checkpoints by step, at most `keep_best`.
        kept: Steps kept for good.

    Raises:
        UserError: A setting is out of range.
    """

    def __init__(
        self,
        keep_last: int | None,
        keep_every: int | None,
        keep_best: int,
        monitor: str,
        mode: str,
    ) -> None:
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{name} is {value}; it must be at least 1, or null")
        if keep_best < 0:
            raise UserError(f"checkpoint.keep_best is {keep_best}; it must be 0 or more")
        if mode not in ("min", "max"):
            raise UserError(f"checkpoint.mode is {mode!r}; it must be min or max")
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.keep_best = keep_best
        self.monitor = monitor
        self.mode = mode
        self.scores: dict[int, float] = {}
        self.kept: set[int] = set()
        self._scores_before: dict[int, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The best checkpoints' scores, their metric and mode, and the steps kept for good."""
        return {
            "scores": dict(self.scores),
            "scored_by": [self.monitor, self.mode],
            "kept": sorted(self.kept),
        }

    def load_state_dict(self, state: dict[str, Any], existing: set[int]) -> None:
        """Restore `state_dict`, as far as the checkpoints still exist.

        Scores by another metric or mode cannot be compared with later scores. The best checkpoints
        by such scores are then kept for good, with a warning, and the best are chosen anew.

        Args:
            state: The state.
            existing: The steps that have a checkpoint.
        """
        scores = {step: score for step, score in state["scores"].items() if step in existing}
        self.kept = existing & set(state.get("kept", ()))
        now = [self.monitor, self.mode]
        before = state.get("scored_by", now)
        if before == now:
            self.scores = scores
            return
        self.scores = {}
        self.kept |= set(scores)
        if scores:
            rank_zero_warn(
                f"checkpoint.monitor and mode are {' '.join(now)}, and were {' '.join(before)}: the"
                f" best checkpoints are chosen anew; those so far ({sorted(scores)}) are kept"
            )

    def admit(self, step: int, score: float) -> bool:
        """Note the score of a step; True if it is among the best so far."""
        if not math.isfinite(score):
            return False
        self._scores_before = dict(self.scores)
        self.scores[step] = score
        self.scores = {best: self.scores[best] for best in self.best_steps()[: self.keep_best]}
        return step in self.scores

    def withdraw(self, step: int) -> None:
        """Forget the score of a step that could not be saved; restore the one it displaced."""
        if step in self.scores:
            self.scores = {k: v for k, v in self._scores_before.items() if k != step}

    def best_steps(self) -> list[int]:
        """Steps with a score, best first; of equal scores the earlier step first."""
        sign = 1 if self.mode == "min" else -1
        return sorted(self.scores, key=lambda step: (sign * self.scores[step], step))

    def spared(self) -> set[int]:
        """Steps that are never pruned: the best, and those kept for good."""
        return {*self.scores, *self.kept}

    def prune(self, folder: Path, newest: int, spared: Iterable[int]) -> None:
        """Delete the checkpoints that need not be kept, once that of step `newest` is complete.

        Checkpoints of later steps stay: they belong to an abandoned branch of the run, and this
        branch overwrites them when it reaches their steps.

        Args:
            folder: The folder of the checkpoints.
            newest: The step of the newest checkpoint.
            spared: The result of `spared` when the writing of `newest` began.

        Raises:
            OSError: A checkpoint could not be deleted.
        """
        steps = [step for step in saved_steps(folder) if step <= newest]
        keep = set(steps if self.keep_last is None else steps[-self.keep_last :])
        keep.update(spared)
        if self.keep_every is not None:
            keep.update(step for step in steps if step % self.keep_every == 0)
        for step in set(steps) - keep:
            for path in checkpoints_of(folder, step):
                remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, if it exists, so that no half-deleted checkpoint keeps the name.

    Raises:
        OSError: The checkpoint could not be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        aside = path.with_name(f"{ASIDE}removed-{path.name}")
        os.replace(path, aside)
        path = aside
    remove(path)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written in `folder`.

    Raises:
        OSError: Something could not be deleted.
    """
    for entry in folder.glob(f"{ASIDE}*"):
        remove(entry)
