"""Retention: which checkpoints to keep (newest, at round steps, best), and deleting the others."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

from mhc_lightning.checkpoints.names import checkpoints_of, saved_steps
from mhc_lightning.errors import UserError
from mhc_lightning.files.atomic import ASIDE, remove


class Retention:
    """Decides what may be deleted.

    Args:
        keep_last: How many of the newest to keep; None keeps all.
        keep_every: Keep for good those at multiples of this many steps.
        keep_best: How many to keep by their score.
        mode: ``min`` if a lower score is better, else ``max``.

    Attributes:
        scores: Scores of the best checkpoints by step, at most `keep_best`.
        kept: Steps that are kept for good.

    Raises:
        UserError: a setting is out of range.
    """

    def __init__(
        self, keep_last: int | None, keep_every: int | None, keep_best: int, mode: str
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
        self.mode = mode
        self.scores: dict[int, float] = {}
        self.kept: set[int] = set()
        self._scores_before: dict[int, float] = {}

    def admit(self, step: int, score: float) -> bool:
        """Note the score of a step; whether it is among the best so far."""
        if not math.isfinite(score):
            return False
        self._scores_before = dict(self.scores)
        self.scores[step] = score
        self.scores = {best: self.scores[best] for best in self.best_steps()[: self.keep_best]}
        return step in self.scores

    def withdraw(self, step: int) -> None:
        """Of a step that could not be saved: what it had displaced is among the best again."""
        if step in self.scores:
            self.scores = {k: v for k, v in self._scores_before.items() if k != step}

    def best_steps(self) -> list[int]:
        """Steps with a score, best first; of equal ones the earlier."""
        sign = 1 if self.mode == "min" else -1
        return sorted(self.scores, key=lambda step: (sign * self.scores[step], step))

    def spared(self) -> set[int]:
        """Steps whose checkpoints stay however many come: the best, and those kept for good."""
        return {*self.scores, *self.kept}

    def prune(self, folder: Path, newest: int, spared: Iterable[int]) -> None:
        """Delete what need not be kept, now that the checkpoint of step `newest` is there.

        Later steps are left alone: they belong to a branch of the run that was given up, and
        are overwritten as this one reaches them.

        Args:
            folder: Where the checkpoints are.
            newest: The step.
            spared: What `spared` was when its writing began.

        Raises:
            OSError: a checkpoint could not be deleted.
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
    """Delete a checkpoint, if it is there, so that no half of it keeps its name.

    Raises:
        OSError: It could not be deleted.
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
