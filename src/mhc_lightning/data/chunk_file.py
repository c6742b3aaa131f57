"""A chunk file of tokens: compared with its checksum, then read."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.errors import UserError
from mhc_lightning.files.checksums import has_checksum


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one file, from which sequences are cut.

    Attributes:
        name: Path of the file below the folder of its data.
        tokens: Number of tokens.
    """

    name: str
    tokens: int


@dataclass(frozen=True)
class Chunk(Span):
    """One file of consecutive tokens that `prepare` wrote.

    Attributes:
        offset: Bytes before the first token (litdata's header).
        size: Bytes of the file.
        sha256: Checksum of the file.
        xxh3: A faster checksum, for training; empty in folders of earlier versions.
    """

    offset: int
    size: int
    sha256: str
    xxh3: str = ""


class DamagedChunkError(UserError):
    """A chunk file differs from its checksum or size, or cannot be read."""


def read_bytes(descriptor: int, size: int, position: int) -> bytes:
    """Bytes [position, position + size) of an open file; fewer at its end.

    Raises:
        OSError: The file cannot be read.
    """
    data = os.pread(descriptor, size, position)
    while len(data) < size:  # one call reads 2 GiB at most
        more = os.pread(descriptor, size - len(data), position + len(data))
        if not more:
            break
        data += more
    return data


class ChunkFile:
    """The tokens of one chunk, read from its file.

    The file is read without a memory map: a map of a file that is cut short, or that the disk
    cannot read, kills the process.

    Args:
        path: The file.
        chunk: Size, checksum and layout of the file.
        dtype: Type of the tokens.
        shown: Name of the file in error messages.
        how_to_fix: The end of the error messages.

    Raises:
        FileNotFoundError: The file does not exist.
        DamagedChunkError: The file cannot be read, or has another size or checksum.
    """

    _descriptor: int | None = None

    def __init__(
        self, path: Path, chunk: Chunk, dtype: np.dtype[Any], shown: str, how_to_fix: str
    ) -> None:
        self._path, self._chunk, self._dtype = path, chunk, dtype
        self._tokens, self._offset, self._itemsize = chunk.tokens, chunk.offset, dtype.itemsize
        self._shown = shown
        self._how_to_fix = how_to_fix
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._damaged(f"cannot be read: {error.strerror}") from error
        self._check()

    def check_again(self) -> None:
        """Compare with the checksum again if the file changed since the last comparison.

        Raises:
            DamagedChunkError: The file cannot be read, or has another size or checksum.
        """
        assert self._descriptor is not None
        if os.fstat(self._descriptor).st_mtime_ns != self._modified:
            self._check()

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the chunk; fewer at its end.

        Raises:
            DamagedChunkError: The file cannot be read, or was cut short.
        """
        assert self._descriptor is not None
        size = max(0, min(count, self._tokens - start)) * self._itemsize
        position = self._offset + start * self._itemsize
        try:
            data = read_bytes(self._descriptor, size, position)
        except OSError as error:
            raise self._damaged(f"cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise self._damaged("was cut short")
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
            if not has_checksum(self._descriptor, self._path, chunk.xxh3, chunk.sha256):
                raise self._damaged("is damaged (checksum)")
        except OSError as error:
            raise self._damaged(f"cannot be read: {error.strerror}") from error

    def _damaged(self, fault: str) -> DamagedChunkError:
        return DamagedChunkError(f"chunk file {self._shown} {fault}; {self._how_to_fix}")
