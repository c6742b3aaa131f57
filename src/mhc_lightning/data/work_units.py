"""Divide the input into units of work that depend on the input alone.

Each unit becomes chunks of its own, so the output is the same for any number of workers, and a
unit that is finished need not be done again. Large files are cut at line ends.
"""

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from mhc_lightning.data.documents import (
    TextFile,
    jsonl_document,
    open_bytes,
)
from mhc_lightning.errors import UserError

# Below so many held-out files a split by whole files is a matter of luck: then each file's end
# is held out instead.
_FEWEST_HELD_OUT_FILES = 10
_HASHED_BYTES = 1 << 20
_COMPRESSION_GUESS = 4
_LONGEST_LINE_SOUGHT = 1 << 20


@dataclass(frozen=True)
class Document:
    """A document, or a part of one that is too long to hold at once.

    Attributes:
        data: Its bytes.
        held_out: Whether it belongs to the validation split.
        ends: Whether the document ends here.
    """

    data: bytes
    held_out: bool
    ends: bool = True


@dataclass
class Skipped:
    """What a unit left out.

    Attributes:
        binary_files: Files in folders that are no text.
        empty_documents: Documents without a byte.
    """

    binary_files: int = 0
    empty_documents: int = 0


class Unit(Protocol):
    """Input that one worker turns into chunks."""

    @property
    def input_size(self) -> int:
        """Its size for the progress bar, in bytes."""

    def documents(
        self, text_field: str, validation_fraction: float, skipped: Skipped
    ) -> Iterator[Document]:
        """Its documents, in order; what is left out is counted in ``skipped``.

        Raises:
            UserError: The input cannot be read, or holds no text where it should.
        """


@dataclass(frozen=True)
class Piece:
    """A part of a file, the bytes [start, stop); stop is None for all of a compressed file.

    Attributes:
        held_out: Which split it belongs to; None if its documents' content decides.
        held_out_end: Share of a compressed plain-text file that is held out, at its end.
        ends: Whether a plain-text document ends with this piece.
    """

    file: TextFile
    start: int = 0
    stop: int | None = None
    held_out: bool | None = None
    held_out_end: float = 0.0
    ends: bool = True

    @property
    def size(self) -> int:
        """Bytes of text, guessed for a compressed file."""
        if self.stop is not None:
            return self.stop - self.start
        return self.file.size * (_COMPRESSION_GUESS if self.file.compression else 1)

    @property
    def input_size(self) -> int:
        """Bytes on disk, for the progress bar."""
        return self.file.size if self.stop is None else self.stop - self.start


@dataclass(frozen=True)
class FileUnit:
    """A :class:`Unit` of files and parts of files."""

    pieces: tuple[Piece, ...]

    @property
    def input_size(self) -> int:
        """See :class:`Unit`."""
        return sum(piece.input_size for piece in self.pieces)

    def documents(
        self, text_field: str, validation_fraction: float, skipped: Skipped
    ) -> Iterator[Document]:
        """See :class:`Unit`."""
        for piece in self.pieces:
            if piece.file.is_jsonl:
                yield from _jsonl_documents(piece, text_field, validation_fraction, skipped)
            else:
                yield from _text_documents(piece, validation_fraction, skipped)


def is_held_out(content: bytes, validation_fraction: float) -> bool:
    """Whether a document belongs to the validation split: a function of its first MiB alone.

    So the split is stable, and exact copies of a document never fall on both sides.
    """
    digest = hashlib.blake2b(content[:_HASHED_BYTES], digest_size=8).digest()
    return int.from_bytes(digest, "big") < validation_fraction * 2**64


def plan_units(
    files: Sequence[TextFile], unit_bytes: int, validation_fraction: float
) -> list[FileUnit]:
    """Cut and pack files into units of about ``unit_bytes`` of text, in the files' order."""
    plain = sum(not file.is_jsonl for file in files)
    by_end = plain * validation_fraction < _FEWEST_HELD_OUT_FILES and validation_fraction > 0
    units: list[FileUnit] = []
    waiting: list[Piece] = []
    size = 0
    for file in files:
        for piece in _pieces(file, unit_bytes, validation_fraction if by_end else 0.0):
            if waiting and size + piece.size > unit_bytes:
                units.append(FileUnit(tuple(waiting)))
                waiting, size = [], 0
            waiting.append(piece)
            size += piece.size
    if waiting:
        units.append(FileUnit(tuple(waiting)))
    return units


def _pieces(file: TextFile, unit_bytes: int, held_out_end: float) -> Iterator[Piece]:
    """The parts of one file; with ``held_out_end`` that share of a plain-text file is held out."""
    if file.compression:
        yield Piece(file, held_out_end=0.0 if file.is_jsonl else held_out_end)
    elif not file.size:
        yield Piece(file, 0, 0)
    elif file.is_jsonl or not held_out_end:
        yield from _cuts(file, 0, file.size, unit_bytes, None)
    else:
        boundary = _boundary(file, int(file.size * (1 - held_out_end)))
        yield from _cuts(file, 0, boundary, unit_bytes, False)
        yield from _cuts(file, boundary, file.size, unit_bytes, True)


def _cuts(
    file: TextFile, start: int, stop: int, unit_bytes: int, held_out: bool | None
) -> Iterator[Piece]:
    while start < stop:
        end = stop
        if stop - start > unit_bytes:
            end = min(stop, _boundary(file, start + unit_bytes))
        yield Piece(file, start, end, held_out, ends=end == stop)
        start = end


def _boundary(file: TextFile, position: int) -> int:
    """Where to cut: the first line that begins at or after ``position``.

    Plain text without a line end for a MiB is cut at the next character; JSONL never is.
    """
    if position <= 0:
        return 0
    with open_bytes(file) as stream:
        stream.seek(position - 1)
        while block := stream.read(_LONGEST_LINE_SOUGHT):
            found = block.find(b"\n")
            if found >= 0:
                return stream.tell() - len(block) + found + 1
            if not file.is_jsonl:
                return position - 1 + _character_start(block)
    return file.size


def _character_start(block: bytes) -> int:
    """Offset, at least 1, of the first byte that is no UTF-8 continuation byte."""
    for offset in range(1, min(len(block), 5)):
        if not 0x80 <= block[offset] < 0xC0:
            return offset
    return len(block) if len(block) < 5 else 1  # the file ends with this character, or no UTF-8


def _unmarked(data: bytes) -> bytes:
    """The beginning of a file without a byte-order mark, which is no part of its text."""
    return data.removeprefix(codecs.BOM_UTF8)


def _text_documents(
    piece: Piece, validation_fraction: float, skipped: Skipped
) -> Iterator[Document]:
    held_out = piece.held_out
    with open_bytes(piece.file) as stream:
        if piece.stop is None:
            data = stream.read()
        else:
            if held_out is None:
                beginning = _unmarked(stream.read(len(codecs.BOM_UTF8) + _HASHED_BYTES))
                held_out = is_held_out(beginning, validation_fraction)
            stream.seek(piece.start)
            data = stream.read(piece.stop - piece.start)
    if piece.stop is not None and len(data) != piece.stop - piece.start:
        raise UserError(f"input {piece.file.path} changed while it was read; run `prepare` again")
    if not piece.start:
        data = _unmarked(data)
    if not data:
        skipped.empty_documents += 1
    elif piece.held_out_end:
        cut = data.find(b"\n", int(len(data) * (1 - piece.held_out_end))) + 1 or len(data)
        yield Document(data[:cut], held_out=False)
        if cut < len(data):
            yield Document(data[cut:], held_out=True)
    else:
        if held_out is None:
            held_out = is_held_out(data, validation_fraction)
        yield Document(data, held_out, piece.ends)


def _line_name(piece: Piece, number: int) -> str:
    """What a message calls the line that is the number-th (from 1) of a piece."""
    with open_bytes(piece.file) as stream:
        remaining = piece.start
        while remaining and (block := stream.read(min(remaining, _HASHED_BYTES))):
            number += block.count(b"\n")
            remaining -= len(block)
    return f"line {number} of {piece.file.path}"


def _jsonl_documents(
    piece: Piece, text_field: str, validation_fraction: float, skipped: Skipped
) -> Iterator[Document]:
    with open_bytes(piece.file) as stream:
        if piece.start:
            stream.seek(piece.start)
        position = piece.start
        for number, line in enumerate(stream, start=1):
            if piece.stop is not None and position >= piece.stop:
                return
            position += len(line)
            if piece.start == 0 and number == 1:
                line = _unmarked(line)
            if not line.strip():
                continue
            data = jsonl_document(line, text_field, partial(_line_name, piece, number))
            if data:
                yield Document(data, is_held_out(data, validation_fraction))
            else:
                skipped.empty_documents += 1
