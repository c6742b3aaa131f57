"""A span of a token file, read where it is, with every id checked."""

import os
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from mhc_lightning.data.chunk_file import Span, read_bytes
from mhc_lightning.data.token_data.token_file import TokenFile
from mhc_lightning.errors import UserError

FileState = tuple[int, int]  # size, time of modification in nanoseconds


@dataclass(frozen=True)
class FileSpan(Span):
    """Consecutive tokens of a token file.

    Attributes:
        file: Number of the file.
        start: Tokens of the file before the first.
    """

    file: int
    start: int


@dataclass(frozen=True)
class IdLimit:
    """The ids that there may be.

    Attributes:
        limit: The first that there may not be.
        reason: What has no more ids, for the error message.
        remedy: What to do about it.
    """

    limit: int
    reason: str
    remedy: str


NO_LIMIT = IdLimit(1 << 31, "ids have 31 bits", "check what wrote the file")


class SpanReader:
    """Reads a span; the interface is `TokenReader`.

    Like `ChunkFile` it does not map the file into memory: a mapped file that is cut short kills the
    process.

    Args:
        file: The file.
        span: The part of it.
        state: Its state when the data were opened.
        limit: The ids that there may be.

    Raises:
        UserError: The file is missing, cannot be read, or was changed since.
    """

    _descriptor: int | None = None

    def __init__(self, file: TokenFile, span: FileSpan, state: FileState, limit: IdLimit) -> None:
        self._file, self._span, self._state, self._limit = file, span, state, limit
        self._ends: list[int] = file.ends.tolist()
        try:
            self._descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(error) from error
        self.check_again()

    def check_again(self) -> None:
        """See `TokenReader`.

        Raises:
            UserError: The file was changed since the data were opened.
        """
        assert self._descriptor is not None
        if state_of(self._descriptor) != self._state:
            raise UserError(
                f"token file {self._file.path} was changed since the run began; go on from the last"
                " checkpoint with the file as it was"
            )

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the span; fewer at its end.

        Raises:
            UserError: The file cannot be read, or holds an id that there may not be.
        """
        stop = self._span.start + min(start + count, self._span.tokens)
        begin = position = self._span.start + start
        parts = []
        run = bisect_right(self._ends, position)
        while position < stop:
            here = min(stop, self._ends[run])
            first = self._ends[run - 1] if run else 0
            parts.append(
                self._read_run(int(self._file.starts[run]), position - first, here - position)
            )
            position, run = here, run + 1
        tokens = (
            parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, self._file.dtype)])
        )
        self._check_ids(tokens, begin)
        return tokens

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    __del__ = close

    def _read_run(self, offset: int, start: int, count: int) -> np.ndarray:
        assert self._descriptor is not None
        itemsize = self._file.dtype.itemsize
        try:
            data = read_bytes(self._descriptor, count * itemsize, offset + start * itemsize)
        except OSError as error:
            raise self._unreadable(error) from error
        if len(data) < count * itemsize:
            raise UserError(f"token file {self._file.path} was cut short; copy it again")
        return np.frombuffer(data, self._file.dtype)

    def _check_ids(self, tokens: np.ndarray, position: int) -> None:
        if not len(tokens) or (tokens.max() < self._limit.limit and tokens.min() >= 0):
            return
        place = int(np.argmax((tokens >= self._limit.limit) | (tokens < 0)))
        raise UserError(
            f"token file {self._file.path} has the id {tokens[place]} (token {position + place}),"
            f" and {self._limit.reason}; {self._limit.remedy}"
        )

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"token file {self._file.path} cannot be read: {error.strerror}")


def state_of(file: int | os.PathLike[str]) -> FileState:
    """The state of a file, which changes with its content."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
