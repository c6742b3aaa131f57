"""The checkpoints of a run, files and folders alike: their names, which to use, whether sound."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from mhc_lightning.checkpoint_files import ASIDE, fault_in_file, load_file
from mhc_lightning.checkpoint_folders import fault_in_folder, load_folder

_NAME = re.compile(r"step_(\d+)(\.ckpt)?")


def checkpoint_name(step: int, *, folder: bool = False) -> str:
    """Name of the checkpoint after `step` optimizer steps.

    ``step_00000100.ckpt``, or ``step_00000100`` for a folder.
    """
    return f"step_{step:08d}" if folder else f"step_{step:08d}.ckpt"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending; empty if there is none."""
    return sorted({step for step, _ in _saved(folder)})


def checkpoints_of(folder: Path, step: int) -> list[Path]:
    """What `folder` holds of a step: a file, a folder, or, rarely, one of each."""
    return [path for saved_step, path in _saved(folder) if saved_step == step]


def candidates_for_last(folder: Path) -> list[Path]:
    """Checkpoints to try for `last`, best first: what the link names, then the earlier steps.

    Later steps than the link's are left out: they belong to a branch that was given up by
    resuming from an earlier checkpoint.
    """
    saved = _saved(folder)
    link = folder / "last"
    named = os.readlink(link) if link.is_symlink() else ""
    match = _NAME.fullmatch(named)
    if match:
        saved = [(step, path) for step, path in saved if step <= int(match.group(1))]
    saved.sort(key=lambda found: (found[0], found[1].name == named), reverse=True)
    return [path for _, path in saved]


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, if it is there, so that no half of it keeps its name.

    Raises:
        OSError: it could not be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        aside = path.with_name(f"{ASIDE}removed-{path.name}")
        os.replace(path, aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`.

    Raises:
        OSError: something could not be deleted.
    """
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.startswith(ASIDE):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)


def fault_in(path: Path) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, or None if it is complete.

    Reads the whole of it, because loading does not look at the tensors' checksums.
    """
    return fault_in_folder(path) if path.is_dir() else fault_in_file(path)


def load_checkpoint(path: Path, *, trusted: bool) -> dict[str, Any]:
    """Read a checkpoint, its tensors only as they are used.

    Args:
        path: The file or folder.
        trusted: Whether pickled Python objects in it may be rebuilt, which can run code.

    Raises:
        UserError: it is not a checkpoint of this package, or holds pickled objects and is not
            trusted.
    """
    load = load_folder if path.is_dir() else load_file
    return load(path, trusted=trusted)


def _saved(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return [
        (int(match.group(1)), path)
        for path in folder.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir() == (match.group(2) is None)
    ]
