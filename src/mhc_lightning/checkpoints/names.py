"""The names of a run's checkpoints, files and folders alike."""

import os
import re
from pathlib import Path

LAST, BEST = "last", "best"  # links beside the checkpoints
_NAME = re.compile(r"step_([0-9]+)(\.ckpt)?")


def checkpoint_name(step: int, *, folder: bool = False) -> str:
    """Name of the checkpoint after `step` optimizer steps.

    `step_00000100.ckpt`, or `step_00000100` for a folder.
    """
    return f"step_{step:08d}" if folder else f"step_{step:08d}.ckpt"


def saved_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in `folder` by (step, path), ascending; empty if there is none."""
    if not folder.is_dir():
        return []
    return sorted(
        (int(match.group(1)), path)
        for path in folder.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir() == (match.group(2) is None)
    )


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending; empty if there is none."""
    return sorted({step for step, _ in saved_checkpoints(folder)})


def checkpoints_of(folder: Path, step: int) -> list[Path]:
    """The checkpoints of a step in `folder`: a file, a folder, or, rarely, one of each."""
    return [path for saved_step, path in saved_checkpoints(folder) if saved_step == step]


def candidates_for_last(folder: Path) -> list[Path]:
    """Checkpoints to try for `last`, in order: the one that the link names, then earlier steps.

    Later steps are left out: they belong to a branch that was abandoned by resuming from an earlier
    checkpoint.
    """
    saved = saved_checkpoints(folder)
    link = folder / LAST
    named = os.readlink(link) if link.is_symlink() else ""
    match = _NAME.fullmatch(named)
    if match:
        saved = [(step, path) for step, path in saved if step <= int(match.group(1))]
    saved.sort(key=lambda entry: (entry[0], entry[1].name == named), reverse=True)
    return [path for _, path in saved]
