"""A span of a token file, read where it is, with every id checked."""

import os
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from mhc_lightning.data.chunk_file import Span, read_bytes
from mhc_lightning.data.context_tokens import as_context
from mhc_lightning.data.token_data.token_file import TokenFile
from mhc_lightning.errors import UserError

FileState = tuple[tuple[int, int], ...]  # size and time of modification [ns], of each file


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

    def __init__(self, file: TokenFile, span: FileSpan, state: FileState, limit: IdLimit) -> None:
        self._file, self._span, self._state, self._limit = file, span, state, limit
        self._tokens = _Runs(file)
        self._context = None if file.context is None else _Runs(file.context.values)
        self._opened = [self._tokens] if self._context is None else [self._tokens, self._context]
        self.check_again()

    def check_again(self) -> None:
        """See `TokenReader`.

        Raises:
            UserError: The file was changed since the data were opened.
        """
        if tuple(opened.state() for opened in self._opened) != self._state:
            raise UserError(
                f"token file {self._file.path} was changed since the run began; go on from the last"
                " checkpoint with the file as it was"
            )

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the span; fewer at its end.

        Those that are not predicted are as in batches (see `context_tokens`).

        Raises:
            UserError: The file cannot be read, or holds an id that there may not be.
        """
        stop = self._span.start + min(start + count, self._span.tokens)
        tokens = self._tokens.read(self._span.start + start, stop)
        self._check_ids(tokens, self._span.start + start)
        if self._context is None or self._file.context is None:
            return tokens
        values = self._context.read(self._span.start + start, stop)
        return as_context(tokens, values == self._file.context.value)

    def close(self) -> None:
        """Close the file."""
        for opened in self._opened:
            opened.close()

    def _check_ids(self, tokens: np.ndarray, position: int) -> None:
        if not len(tokens) or (tokens.max() < self._limit.limit and tokens.min() >= 0):
            return
        place = int(np.argmax((tokens >= self._limit.limit) | (tokens < 0)))
        raise UserError(
            f"token file {self._file.path} has the id {tokens[place]} (token {position + place}),"
            f" and {self._limit.reason}; {self._limit.remedy}"
        )


class _Runs:
    """The runs of a file, opened."""

    _descriptor: int | None = None

    def __init__(self, file: TokenFile) -> None:
        self._file = file
        self._ends: list[int] = file.ends.tolist()
        try:
            self._descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(error) from error

    def state(self) -> tuple[int, int]:
        assert self._descriptor is not None
        return _state(self._descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the file."""
        parts = []
        run = bisect_right(self._ends, start)
        while start < stop:
            here = min(stop, self._ends[run])
            before = self._ends[run - 1] if run else 0
            parts.append(self._read_run(int(self._file.starts[run]), start - before, here - start))
            start, run = here, run + 1
        return (
            parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self._file.dtype), *parts])
        )

    def close(self) -> None:
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

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"token file {self._file.path} cannot be read: {error.strerror}")


def state_of(file: TokenFile) -> FileState:
    """The state of a token file and of what belongs to it, which changes with their content."""
    context = () if file.context is None else (_state(file.context.values.path),)
    return (_state(file.path), *context)


def _state(file: int | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
