"""The checkpoints of a run, files and folders alike: whether sound, read, and removed."""

import os
import shutil
from pathlib import Path
from typing import Any

from mhc_lightning.checkpoints.folder_reading import fault_in_folder, load_folder
from mhc_lightning.checkpoints.whole_file import fault_in_file, load_file
from mhc_lightning.files.atomic import ASIDE


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
