"""Writing a checkpoint that is one file, atomically."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from mhc_lightning.files.atomic import replacing


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write `checkpoint` to `path`; a file there does not change until the new one is complete.

    Raises:
        OSError: The file could not be written (disk full, permissions, …). `path` is untouched,
            and no partial file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as aside,
        open(aside, "wb") as file,
        keeping_errors(file) as stream,
    ):
        torch.save(checkpoint, stream)


@contextlib.contextmanager
def keeping_errors(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """A stream to `file` for torch, whose archive writer hides why the system refused a write.

    Raises:
        OSError: The system refused a write; raised in place of torch's error.
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
