"""Input files, opened as bytes: decompressed, in UTF-8, with checks for damage and changes."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from mhc_lightning.data.file_formats import JSON_LINES, PLAIN_TEXT
from mhc_lightning.data.formats.compression import damage_named, decompressed
from mhc_lightning.data.formats.encodings import Utf8Stream
from mhc_lightning.data.formats.streams import BUFFER_BYTES
from mhc_lightning.data.input_urls import is_url, is_web, open_url
from mhc_lightning.errors import UserError


@dataclass(frozen=True)
class TextFile:
    """One input file.

    Attributes:
        path: Path of the file.
        name: Path below the input that the file was found in, with forward slashes; orders files.
        size: Bytes on disk.
        modified: Modification time in nanoseconds.
        format: Name of the file's format, see `file_formats`.
        compression: `.gz`, `.zst`, `.bz2`, `.xz` or an empty string.
        encoding: Encoding of a text that is not UTF-8; else empty.
        version: What the file system behind a URL knows the content by; empty for a local file.
        storage_options: Options of the file system behind a URL.
    """

    path: str
    name: str
    size: int
    modified: int
    format: str = PLAIN_TEXT
    compression: str = ""
    encoding: str = ""
    version: str = ""
    storage_options: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def is_jsonl(self) -> bool:
        """True if each line is a JSON object that holds a document."""
        return self.format == JSON_LINES

    @property
    def can_be_cut(self) -> bool:
        """True if bytes in the middle of the file can be read by themselves."""
        return not (self.compression or self.encoding or is_web(self.path))

    @property
    def description(self) -> str:
        """What the file was taken for."""
        return f"{self.format} in {self.encoding}" if self.encoding else self.format


@contextmanager
def open_source(file: TextFile, *, seek: bool = False) -> Iterator[BinaryIO]:
    """Open a file for reading as it is stored.

    Args:
        file: The file.
        seek: Read from places all over the file; else, on the web, from beginning to end only.

    Raises:
        UserError: The file cannot be read, what is read from it is damaged or cut short, or it
            changed since it was found.
    """
    if is_url(file.path):
        with (
            damage_named(file.path),
            open_url(file.path, file.size, file.version, file.storage_options, seek) as stream,
        ):
            yield stream
        return
    with damage_named(file.path), open(file.path, "rb") as raw:
        _check_unchanged(raw, file)
        yield raw
        _check_unchanged(raw, file)


@contextmanager
def open_bytes(file: TextFile, max_expansion: float = float("inf")) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed and, if it is text, in UTF-8.

    Args:
        file: The file.
        max_expansion: See `compression.decompressed`.

    Raises:
        UserError: See `open_source`; or the file unpacks to more than it may.
    """
    with open_source(file) as raw:
        yield as_utf8(
            decompressed(raw, file.compression, file.path, file.size, max_expansion),
            file.encoding,
            file.path,
        )


def as_utf8(stream: io.BufferedReader, encoding: str, name: str) -> io.BufferedReader:
    """A stream of text in UTF-8; an empty encoding stands for UTF-8."""
    if not encoding:
        return stream
    return io.BufferedReader(Utf8Stream(stream, encoding, name), BUFFER_BYTES)


def _check_unchanged(raw: BinaryIO, file: TextFile) -> None:
    status = os.fstat(cast(io.BufferedReader, raw).fileno())
    if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
        raise UserError(f"input {file.path} changed while it was read; run `prepare` again")
