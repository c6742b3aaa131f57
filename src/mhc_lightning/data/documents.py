"""Find text on disk and read it as documents: plain text, JSONL, and .gz or .zst of these.

A plain-text file is one document, a JSONL line is one document. Files with NUL bytes are no text
and are skipped and counted; bytes that are no UTF-8 are kept and counted.
"""

import fnmatch
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_lightning.errors import UserError

_COMPRESSED = (".gz", ".zst")
_JSONL = (".jsonl", ".ndjson")
_BUFFER_BYTES = 1 << 16


@dataclass(frozen=True)
class TextFile:
    """One input file.

    Attributes:
        path: Where it is.
        name: Its path below the input it was found in, with forward slashes; orders the files.
        size: Bytes on disk.
        modified: Modification time in nanoseconds.
    """

    path: str
    name: str
    size: int
    modified: int

    @property
    def compression(self) -> str:
        """``.gz``, ``.zst`` or nothing."""
        suffix = os.path.splitext(self.name)[1].lower()
        return suffix if suffix in _COMPRESSED else ""

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON object that holds a document."""
        stem = self.name[: len(self.name) - len(self.compression)]
        return stem.lower().endswith(_JSONL)


def find_text_files(
    inputs: Sequence[str | Path],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    not_below: Sequence[Path] = (),
) -> list[TextFile]:
    """All files of the inputs, folders recursively, in a fixed order.

    Hidden files and folders (`.git`) and `__pycache__` are left out below a folder; a file that is
    named itself is always taken.

    Args:
        inputs: Files and folders.
        include: Shell patterns; with any, only files that match one are taken. A pattern with a
            slash is compared with the path below the input, one without with each part of it.
        exclude: Shell patterns of files and folders to leave out.
        not_below: Folders that are not entered, such as the output.

    Raises:
        UserError: An input does not exist or cannot be read.
    """
    files: list[TextFile] = []
    for given in inputs:
        root = Path(given)
        try:
            if root.is_dir():
                files += _walk(root, include, exclude, {path.absolute() for path in not_below})
            else:
                files.append(_text_file(root, root.name))
        except FileNotFoundError as error:
            raise UserError(f"input {error.filename} does not exist") from error
        except OSError as error:
            raise UserError(
                f"input {error.filename or root} cannot be read: {error.strerror};"
                " mend its permissions or leave it out with exclude=…"
            ) from error
    return files


def _walk(
    root: Path, include: Sequence[str], exclude: Sequence[str], not_below: set[Path]
) -> list[TextFile]:
    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        below = Path(folder).relative_to(root)
        subfolders[:] = [
            name
            for name in subfolders
            if _is_visible(name)
            and Path(folder, name).absolute() not in not_below
            and not _matches((below / name).as_posix(), exclude)
        ]
        for name in names:
            relative = (below / name).as_posix()
            if not _is_visible(name) or _matches(relative, exclude):
                continue
            path = Path(folder, name)
            if (not include or _matches(relative, include)) and path.is_file():
                found.append(_text_file(path, relative))
    return sorted(found, key=lambda file: file.name)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def _matches(relative: str, patterns: Sequence[str]) -> bool:
    parts = relative.split("/")
    return any(
        fnmatch.fnmatchcase(relative, pattern)
        if "/" in pattern
        else any(fnmatch.fnmatchcase(part, pattern) for part in parts)
        for pattern in patterns
    )


def _text_file(path: Path, name: str) -> TextFile:
    status = path.stat()
    return TextFile(str(path), name, status.st_size, status.st_mtime_ns)


@contextmanager
def open_bytes(file: TextFile) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed.

    Raises:
        UserError: It cannot be read, or its compressed data are damaged or cut short.
    """
    import zstandard

    try:
        with open(file.path, "rb") as raw:
            if file.compression == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER_BYTES)
            elif file.compression == ".zst":
                yield io.BufferedReader(_ZstdFrames(raw), _BUFFER_BYTES)
            else:
                yield raw
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
        raise UserError(
            f"input {file.path} is damaged: {error}; repair it or leave it out"
        ) from error
    except OSError as error:
        raise UserError(f"input {file.path} cannot be read: {error.strerror or error}") from error


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

                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(compressed))
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
        taken = min(len(buffer), len(self._ready))
        buffer[:taken] = self._ready[:taken]
        self._ready = self._ready[taken:]
        return taken


def looks_binary(stream: io.BufferedReader) -> bool:
    """Whether the next bytes (what the reader buffers, some KiB) hold a NUL; consumes nothing."""
    return b"\0" in stream.peek()


def jsonl_document(line: bytes, field: str, file: TextFile, number: int) -> bytes:
    """The document in one JSONL line; empty if its field is null.

    Args:
        line: The line, possibly with bytes that are no UTF-8 (they are kept).
        field: The key under which the text is.
        file: For the error message.
        number: For the error message: the line, first 1; 0 if unknown.

    Raises:
        UserError: No JSON object, no such field, or its value is no string.
    """
    where = f"line {number} of {file.path}" if number else f"a line of {file.path}"
    try:
        row = json.loads(line.decode("utf-8", errors="surrogateescape"))
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}); mend or remove it") from error
    if not isinstance(row, dict) or field not in row:
        keys = ", ".join(map(repr, row)) if isinstance(row, dict) else "no fields at all"
        raise UserError(f"{where} has no field {field!r} but {keys}; name one with text_field=…")
    text = row[field]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise UserError(
            f"field {field!r} in {where} is {type(text).__name__}, not text;"
            " name another with text_field=…"
        )
    return text_bytes(text)


def text_bytes(text: str) -> bytes:
    """UTF-8 of a string; escaped bytes come back, and other lone surrogates are kept (invalid)."""
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="surrogatepass")
