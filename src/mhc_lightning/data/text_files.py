"""Input files, opened as bytes: plain, `.gz` or `.zst`, with checks for damage and changes."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mhc_lightning.data.file_formats import JSON_LINES, PLAIN_TEXT, compression_of
from mhc_lightning.errors import UserError

_BUFFER_BYTES = 1 << 16
_LARGEST_ZSTD_WINDOW = 1 << 31  # of `zstd --long=31`, which large public archives use


@dataclass(frozen=True)
class TextFile:
    """One input file.

    Attributes:
        path: Path of the file.
        name: Path below the input that the file was found in, with forward slashes; orders files.
        size: Bytes on disk.
        modified: Modification time in nanoseconds.
        format: Name of the file's format, see `file_formats`.
    """

    path: str
    name: str
    size: int
    modified: int
    format: str = PLAIN_TEXT

    @property
    def compression(self) -> str:
        """`.gz`, `.zst` or an empty string."""
        return compression_of(self.name)

    @property
    def is_jsonl(self) -> bool:
        """True if each line is a JSON object that holds a document."""
        return self.format == JSON_LINES


@contextmanager
def open_bytes(file: TextFile) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed.

    Raises:
        UserError: The file cannot be read, its compressed data are damaged or cut short, or it
            changed since it was found.
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
    """All frames of a `.zst` file. zstandard's own reader misses a frame that is cut short."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw = raw
        self._frame: Any = None  # the decompressor of the current frame
        self._next_frame = b""  # compressed bytes read past the end of the last frame
        self._output = memoryview(b"")  # decompressed bytes not handed out yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            compressed = self._next_frame or self._raw.read(_BUFFER_BYTES)
            self._next_frame = b""
            if not compressed:
                if self._frame is not None:
                    raise EOFError("compressed file ended before its last frame did")
                return 0
            if self._frame is None:
                import zstandard

                self._frame = zstandard.ZstdDecompressor(
                    max_window_size=_LARGEST_ZSTD_WINDOW
                ).decompressobj()
            self._output = memoryview(self._frame.decompress(compressed))
            if self._frame.eof:
                self._next_frame = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count
