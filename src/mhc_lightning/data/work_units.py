"""The input divided into work units, each of which one worker process tokenizes.

The division depends on the input alone. Each unit becomes chunk files of its own, so the output is
the same for any number of workers, and a finished unit need not be repeated. Large files are cut
at line ends.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from mhc_lightning.data.documents import (
    HASHED_BYTES,
    Document,
    Skipped,
    is_held_out,
    jsonl_document,
)
from mhc_lightning.data.text_files import TextFile, open_bytes
from mhc_lightning.errors import UserError

# With fewer held-out files than this, a split by whole files would depend on chance. Then the end
# of each file is held out instead.
_FEWEST_HELD_OUT_FILES = 10
_COMPRESSION_GUESS = 4
_LONGEST_LINE_SOUGHT = 1 << 20


class WorkUnit(Protocol):
    """Input that one worker turns into chunks."""

    @property
    def input_size(self) -> int:
        """Bytes of input, for the progress bar."""

    def documents(
        self, text_field: str, validation_fraction: float, skipped: Skipped
    ) -> Iterator[Document]:
        """The documents of the unit, in order; input that is left out is counted in `skipped`.

        Raises:
            UserError: The input cannot be read, or a document is not text.
        """


@dataclass(frozen=True)
class FilePart:
    """A part of a file, the bytes [start, stop); `stop` is None for all of a compressed file.

    Attributes:
        held_out: The split of this part; None if the content of its documents decides.
        held_out_end: Share of a compressed plain-text file that is held out, at its end.
        ends: True if a plain-text document ends with this part.
    """

    file: TextFile
    start: int = 0
    stop: int | None = None
    held_out: bool | None = None
    held_out_end: float = 0.0
    ends: bool = True

    @property
    def size(self) -> int:
        """Bytes of text, estimated for a compressed file."""
        if self.stop is not None:
            return self.stop - self.start
        return self.file.size * (_COMPRESSION_GUESS if self.file.compression else 1)

    @property
    def input_size(self) -> int:
        """Bytes on disk, for the progress bar."""
        return self.file.size if self.stop is None else self.stop - self.start


@dataclass(frozen=True)
class FileUnit:
    """A `WorkUnit` of files and parts of files."""

    parts: tuple[FilePart, ...]

    @property
    def input_size(self) -> int:
        """See `WorkUnit`."""
        return sum(part.input_size for part in self.parts)

    def documents(
        self, text_field: str, validation_fraction: float, skipped: Skipped
    ) -> Iterator[Document]:
        """See `WorkUnit`."""
        for part in self.parts:
            if part.file.is_jsonl:
                yield from _jsonl_documents(part, text_field, validation_fraction, skipped)
            else:
                yield from _text_documents(part, validation_fraction, skipped)


def plan_units(
    files: Sequence[TextFile], unit_bytes: int, validation_fraction: float
) -> list[FileUnit]:
    """Cut and pack files into units of about `unit_bytes` of text, in the order of the files."""
    plain = sum(not file.is_jsonl for file in files)
    by_end = plain * validation_fraction < _FEWEST_HELD_OUT_FILES and validation_fraction > 0
    units: list[FileUnit] = []
    unit: list[FilePart] = []
    size = 0
    for file in files:
        for part in _parts(file, unit_bytes, validation_fraction if by_end else 0.0):
            if unit and size + part.size > unit_bytes:
                units.append(FileUnit(tuple(unit)))
                unit, size = [], 0
            unit.append(part)
            size += part.size
    if unit:
        units.append(FileUnit(tuple(unit)))
    return units


def _parts(file: TextFile, unit_bytes: int, held_out_end: float) -> Iterator[FilePart]:
    """The parts of one file; `held_out_end` is the share of a plain-text file to hold out."""
    if file.compression:
        yield FilePart(file, held_out_end=0.0 if file.is_jsonl else held_out_end)
    elif not file.size:
        yield FilePart(file, 0, 0)
    elif file.is_jsonl or not held_out_end:
        yield from _cut(file, 0, file.size, unit_bytes, None)
    else:
        boundary = _boundary(file, int(file.size * (1 - held_out_end)))
        yield from _cut(file, 0, boundary, unit_bytes, False)
        yield from _cut(file, boundary, file.size, unit_bytes, True)


def _cut(
    file: TextFile, start: int, stop: int, unit_bytes: int, held_out: bool | None
) -> Iterator[FilePart]:
    """The bytes [start, stop) of a file in parts of about `unit_bytes`."""
    while start < stop:
        end = stop
        if stop - start > unit_bytes:
            end = min(stop, _boundary(file, start + unit_bytes))
        yield FilePart(file, start, end, held_out, ends=end == stop)
        start = end


def _boundary(file: TextFile, position: int) -> int:
    """The first beginning of a line at or after `position`.

    Plain text without a line end for a MiB is cut at the next character; JSON Lines never are.
    """
    if position <= 0:
        return 0
    with open_bytes(file) as stream:
        stream.seek(position - 1)
        while block := stream.read(_LONGEST_LINE_SOUGHT):
            line_end = block.find(b"\n")
            if line_end >= 0:
                return stream.tell() - len(block) + line_end + 1
            if not file.is_jsonl:
                return position - 1 + _character_start(block)
    return file.size


def _character_start(block: bytes) -> int:
    """Offset, at least 1, of the first byte that is no UTF-8 continuation byte."""
    for offset in range(1, min(len(block), 5)):
        if not 0x80 <= block[offset] < 0xC0:
            return offset
    return len(block) if len(block) < 5 else 1  # end of the file, or not UTF-8


def _without_mark(data: bytes) -> bytes:
    """The beginning of a file without a byte-order mark, which is no part of the text."""
    return data.removeprefix(codecs.BOM_UTF8)


def _text_documents(
    part: FilePart, validation_fraction: float, skipped: Skipped
) -> Iterator[Document]:
    held_out = part.held_out
    with open_bytes(part.file) as stream:
        if part.stop is None:
            data = stream.read()
        else:
            if held_out is None:
                beginning = _without_mark(stream.read(len(codecs.BOM_UTF8) + HASHED_BYTES))
                held_out = is_held_out(beginning, validation_fraction)
            stream.seek(part.start)
            data = stream.read(part.stop - part.start)
    if part.stop is not None and len(data) != part.stop - part.start:
        raise UserError(f"input {part.file.path} changed while it was read; run `prepare` again")
    if not part.start:
        data = _without_mark(data)
    if not data:
        skipped.empty_documents += 1
    elif part.held_out_end:
        cut = data.find(b"\n", int(len(data) * (1 - part.held_out_end))) + 1 or len(data)
        yield Document(data[:cut], held_out=False)
        if cut < len(data):
            yield Document(data[cut:], held_out=True)
    else:
        if held_out is None:
            held_out = is_held_out(data, validation_fraction)
        yield Document(data, held_out, part.ends)


def _jsonl_documents(
    part: FilePart, text_field: str, validation_fraction: float, skipped: Skipped
) -> Iterator[Document]:
    with open_bytes(part.file) as stream:
        if part.start:
            stream.seek(part.start)
        position = part.start
        for number, line in enumerate(stream, start=1):
            if part.stop is not None and position >= part.stop:
                return
            position += len(line)
            if part.start == 0 and number == 1:
                line = _without_mark(line)
            if not line.strip():
                continue
            data = jsonl_document(line, text_field, partial(_line_name, part, number))
            if data:
                yield Document(data, is_held_out(data, validation_fraction))
            else:
                skipped.empty_documents += 1


def _line_name(part: FilePart, number: int) -> str:
    """Name of the number-th line (from 1) of a part, for error messages."""
    with open_bytes(part.file) as stream:
        remaining = part.start
        while remaining and (block := stream.read(min(remaining, HASHED_BYTES))):
            number += block.count(b"\n")
            remaining -= len(block)
    return f"line {number} of {part.file.path}"
