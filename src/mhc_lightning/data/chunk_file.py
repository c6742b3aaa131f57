"""One open chunk of tokens, checked against its checksum before any of it is used."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.errors import UserError
from mhc_lightning.files.checksums import is_right


@dataclass(frozen=True)
class Chunk:
    """One file of consecutive tokens.

    Attributes:
        name: Path below the prepared folder, ``train/chunk-….bin``.
        tokens: Number of tokens.
        offset: Bytes before the first token (litdata's header).
        size: Bytes of the file.
        sha256: Checksum of the file.
        xxh3: A faster one, which is checked in training; empty in folders of earlier versions.
    """

    name: str
    tokens: int
    offset: int
    size: int
    sha256: str
    xxh3: str = ""


class DamagedChunkError(UserError):
    """A chunk file is not what `prepare` wrote, or cannot be read."""


class ChunkFile:
    """The tokens of one chunk, read from its file.

    Ordinary reads and no memory map: of a file that is cut short or that its disk cannot read, a
    map kills the process.

    Args:
        path: The file.
        chunk: What it must be.
        dtype: Type of its tokens.
        shown: How error messages name it.
        how_to_mend: The end of the error messages.

    Raises:
        FileNotFoundError: It is not there.
        DamagedChunkError: It cannot be read or is not what it must be.
    """

    _descriptor: int | None = None

    def __init__(
        self, path: Path, chunk: Chunk, dtype: np.dtype[Any], shown: str, how_to_mend: str
    ) -> None:
        self._path, self._chunk, self._dtype = path, chunk, dtype
        self._tokens, self._offset, self._itemsize = chunk.tokens, chunk.offset, dtype.itemsize
        self._shown = shown
        self._how_to_mend = how_to_mend
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._damaged(f"cannot be read: {error.strerror}") from error
        self._check()

    def check_again(self) -> None:
        """Compare with the checksum again if the file changed since that was done.

        Raises:
            DamagedChunkError: It is no longer what it must be, or cannot be read.
        """
        assert self._descriptor is not None
        if os.fstat(self._descriptor).st_mtime_ns != self._modified:
            self._check()

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the chunk, or those of them that there are.

        Raises:
            DamagedChunkError: They cannot be read.
        """
        assert self._descriptor is not None
        wanted = max(0, min(count, self._tokens - start)) * self._itemsize
        position = self._offset + start * self._itemsize
        try:
            data = os.pread(self._descriptor, wanted, position)
            while len(data) < wanted:  # one call reads 2 GiB at most
                more = os.pread(self._descriptor, wanted - len(data), position + len(data))
                if not more:
                    raise self._damaged("was cut short")
                data += more
        except OSError as error:
            raise self._damaged(f"cannot be read: {error.strerror}") from error
        return np.frombuffer(data, self._dtype)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    __del__ = close

    def _check(self) -> None:
        assert self._descriptor is not None
        chunk = self._chunk
        try:
            status = os.fstat(self._descriptor)
            self._modified = status.st_mtime_ns
            if status.st_size != chunk.size:
                raise self._damaged(f"has {status.st_size} bytes, not {chunk.size}")
            if not is_right(self._descriptor, self._path, chunk.xxh3, chunk.sha256):
                raise self._damaged("is damaged (checksum)")
        except OSError as error:
            raise self._damaged(f"cannot be read: {error.strerror}") from error

    def _damaged(self, how: str) -> DamagedChunkError:
        return DamagedChunkError(f"chunk file {self._shown} {how}; {self._how_to_mend}")
