"""A checkpoint that is one file: written atomically, checked, read."""

import contextlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from mhc_lightning.errors import UserError
from mhc_lightning.files.atomic import ASIDE, sync_folder


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write `checkpoint` to `path`, which stays as it was until the new file is complete.

    The bytes go to a file aside, reach the disk (fsync), and only then take the name.

    Raises:
        OSError: the file could not be written (disk full, permissions, …). `path` is untouched
            and nothing is left aside.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f"{ASIDE}{path.name}"
    try:
        with open(aside, "wb") as file:
            with keeping_errors(file) as stream:
                torch.save(checkpoint, stream)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def fault_in_file(path: Path) -> str | None:
    """Why the checkpoint file at `path` cannot be trusted, or None if it is complete.

    Reads the whole file: the archive carries a checksum for every tensor, which `torch.load`
    does not look at.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = archive.namelist()
    except zipfile.BadZipFile:
        size = path.stat().st_size
        return f"not a complete checkpoint (cut short or overwritten; {size} bytes)"
    except OSError as error:
        return f"unreadable ({error.strerror or error})"
    if damaged is not None:
        return f"damaged: {damaged} does not match its checksum"
    if not any(name.endswith("data.pkl") for name in names):
        return "not a torch checkpoint"
    return None


def load_file(path: Path, *, trusted: bool) -> dict[str, Any]:
    """Read a checkpoint file into CPU memory, lazily (memory-mapped) where the file system can.

    Args:
        path: The file.
        trusted: Whether pickled Python objects in it may be rebuilt, which can run code.

    Raises:
        UserError: it is not a checkpoint of this package, or holds pickled objects and is not
            trusted.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=not trusted)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"checkpoint {path} holds pickled Python objects, which could run code when"
                " loaded; if you trust where it comes from, copy it into the run's checkpoints/"
                " folder and load it from there"
            ) from error
        raise UserError(f"checkpoint {path} cannot be loaded: {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"checkpoint {path} has no model in it (no `state_dict`)")
    return checkpoint


@contextlib.contextmanager
def keeping_errors(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """A stream to `file` for torch, whose archive writer hides why the system refused a write.

    Raises:
        OSError: the reason, in place of torch's error.
    """
    stream = _ErrorKeepingWriter(file)
    try:
        yield cast(IO[bytes], stream)
    except RuntimeError:
        if stream.error is not None:
            raise stream.error from None
        raise


class _ErrorKeepingWriter:
    """A binary stream that remembers the operating system's reason when a write fails."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
