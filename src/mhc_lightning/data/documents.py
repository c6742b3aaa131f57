"""Text on disk, read as documents: plain text, JSON Lines, and .gz or .zst of these.

A plain-text file is one document, a line of JSON Lines is one document. Bytes that are no UTF-8 and
NUL bytes are kept, and counted.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mhc_lightning.data.file_formats import JSON_LINES, PLAIN_TEXT, compression_of
from mhc_lightning.errors import UserError

_BUFFER_BYTES = 1 << 16
_LARGEST_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` makes, as large public archives are
_SURROGATE = re.compile("([\ud800-\udfff])")


@dataclass(frozen=True)
class TextFile:
    """One input file.

    Attributes:
        path: Where it is.
        name: Its path below the input it was found in, with forward slashes; orders the files.
        size: Bytes on disk.
        modified: Modification time in nanoseconds.
        form: What it holds, see :mod:`mhc_lightning.data.file_formats`.
    """

    path: str
    name: str
    size: int
    modified: int
    form: str = PLAIN_TEXT

    @property
    def compression(self) -> str:
        """``.gz``, ``.zst`` or nothing."""
        return compression_of(self.name)

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON object that holds a document."""
        return self.form == JSON_LINES


@contextmanager
def open_bytes(file: TextFile) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed.

    Raises:
        UserError: It cannot be read, its compressed data are damaged or cut short, or it changed
            since it was found.
    """
    import zstandard

    try:
        with open(file.path, "rb") as raw:
            _check_unchanged(raw, file)
            if file.compression == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER_BYTES)
            elif file.compression == ".zst":
                yield io.BufferedReader(_ZstdFrames(raw), _BUFFER_BYTES)
            else:
                yield raw
            _check_unchanged(raw, file)
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
        raise UserError(
            f"input {file.path} is damaged: {error}; repair it or leave it out"
        ) from error
    except OSError as error:
        raise UserError(f"input {file.path} cannot be read: {error.strerror or error}") from error


def _check_unchanged(raw: io.BufferedReader, file: TextFile) -> None:
    status = os.fstat(raw.fileno())
    if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
        raise UserError(f"input {file.path} changed while it was read; run `prepare` again")


class _ZstdFrames(io.RawIOBase):
    """All frames of a .zst file; unlike zstandard's own reader it sees that one is cut short."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw = raw
        self._frame: Any = None
        self._rest = b""  # compressed bytes that belong to the next frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._rest or self._raw.read(_BUFFER_BYTES)
            self._rest = b""
            if not compressed:
                if self._frame is not None:
                    raise EOFError("compressed file ended before its last frame did")
                return 0
            if self._frame is None:
                import zstandard

                self._frame = zstandard.ZstdDecompressor(
                    max_window_size=_LARGEST_ZSTD_WINDOW
                ).decompressobj()
            self._ready = memoryview(self._frame.decompress(compressed))
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
        taken = min(len(buffer), len(self._ready))
        buffer[:taken] = self._ready[:taken]
        self._ready = self._ready[taken:]
        return taken


def jsonl_document(line: bytes, field: str, where: Callable[[], str]) -> bytes:
    """The document in one JSONL line; empty if its field is null.

    Args:
        line: The line, possibly with bytes that are no UTF-8 (they are kept).
        field: The key under which the text is.
        where: Names the line, for the error message.

    Raises:
        UserError: No JSON object, no such field, or its value is no string.
    """
    try:
        row = json.loads(line.decode("utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where()} is no JSON ({error}); mend or remove it") from error
    if not isinstance(row, dict) or field not in row:
        keys = ", ".join(map(repr, row)) if isinstance(row, dict) else "no fields at all"
        raise UserError(f"{where()} has no field {field!r} but {keys}; name one with text_field=…")
    text = row[field]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise UserError(
            f"field {field!r} in {where()} is {type(text).__name__}, not text;"
            " name another with text_field=…"
        )
    return text_bytes(text)


def text_bytes(text: str) -> bytes:
    """UTF-8 of a string; escaped bytes come back, and other lone surrogates are kept (invalid)."""
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        parts = _SURROGATE.split(text)  # text and surrogates in turn
        return b"".join(
            part.encode(
                "utf-8", "surrogateescape" if "\udc80" <= part <= "\udcff" else "surrogatepass"
            )
            for part in parts
        )
