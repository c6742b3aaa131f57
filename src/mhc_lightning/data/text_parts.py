"""Parts of files of plain text and JSON Lines, cut between lines, and files read as a whole."""

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from mhc_lightning.data.documents import (
    HASHED_BYTES,
    Document,
    ReadingLog,
    ReadingOptions,
    Skipped,
    is_held_out,
    record_documents,
)
from mhc_lightning.data.formats.compression import COMPRESSION_GUESS
from mhc_lightning.data.stream_documents import (
    json_lines,
    stream_documents,
    text_documents,
    without_mark,
)
from mhc_lightning.data.text_cuts import TextCuts
from mhc_lightning.data.text_files import TextFile, open_bytes
from mhc_lightning.errors import UserError

_LONGEST_LINE_SOUGHT = 1 << 20
_LONGEST_UNCUT = 1 << 26  # a text without any proven cut is cut all the same


@dataclass(frozen=True)
class FilePart:
    """A part of a file of plain text or JSON Lines: the bytes [start, stop).

    Attributes:
        held_out: The split of this part; None if the content of its documents decides.
        ends: True if a plain-text document ends with this part.
        proven_cut: See `Document`.
        begins: True if a plain-text document begins with this part.
    """

    file: TextFile
    start: int
    stop: int
    held_out: bool | None = None
    ends: bool = True
    proven_cut: bool = True
    begins: bool = True

    @property
    def size(self) -> int:
        """Bytes of text."""
        return self.stop - self.start

    @property
    def input_size(self) -> int:
        """Bytes on disk, for the progress bar."""
        return self.size

    def documents(self, reading: ReadingOptions, log: ReadingLog) -> Iterator[Document]:
        """See `WorkUnit`."""
        skipped = log.skipped
        if self.file.is_jsonl:
            with open_bytes(self.file) as stream:
                stream.seek(self.start)
                yield from record_documents(
                    json_lines(self._lines(stream)), self._line_name, reading, skipped
                )
        else:
            yield from self._text(reading, skipped)

    def _text(self, reading: ReadingOptions, skipped: Skipped) -> Iterator[Document]:
        held_out = self.held_out
        with open_bytes(self.file) as stream:
            if held_out is None:
                beginning = without_mark(stream).read(HASHED_BYTES)
                held_out = is_held_out(beginning, reading.validation_fraction)
            stream.seek(self.start)
            data = stream.read(self.size)
        if len(data) != self.size:
            raise UserError(
                f"input {self.file.path} changed while it was read; run `prepare` again"
            )
        if not self.start:
            data = data.removeprefix(codecs.BOM_UTF8)
        if data:
            yield Document(data, held_out, self.ends, self.proven_cut, self.begins)
        else:
            skipped.empty_documents += 1

    def _lines(self, stream: io.BufferedReader) -> Iterator[bytes]:
        position = self.start
        for line in stream:
            if position >= self.stop:
                return
            yield line if position else line.removeprefix(codecs.BOM_UTF8)
            position += len(line)

    def _line_name(self, number: int) -> str:
        """Name of the number-th line (from 1) of this part, for error messages."""
        with open_bytes(self.file) as stream:
            remaining = self.start
            while remaining and (block := stream.read(min(remaining, HASHED_BYTES))):
                number += block.count(b"\n")
                remaining -= len(block)
        return f"line {number} of {self.file.path}"


@dataclass(frozen=True)
class WholeFile:
    """A file that can only be read from its beginning to its end, in bounded memory.

    Attributes:
        held_out_end: Share of a plain text that is held out, at its end.
    """

    file: TextFile
    held_out_end: float = 0.0

    @property
    def size(self) -> int:
        """Bytes of text, estimated for a compressed file."""
        return self.file.size * (COMPRESSION_GUESS if self.file.compression else 1)

    @property
    def input_size(self) -> int:
        """Bytes on disk, for the progress bar."""
        return self.file.size

    def documents(self, reading: ReadingOptions, log: ReadingLog) -> Iterator[Document]:
        """See `WorkUnit`."""
        skipped = log.skipped
        opened = partial(open_bytes, self.file, reading.max_expansion)
        if not self.held_out_end:
            with opened() as stream:
                yield from stream_documents(
                    stream, self.file.format, self.file.path, reading, skipped
                )
            return
        with opened() as stream:
            total = sum(map(len, iter(partial(without_mark(stream).read, HASHED_BYTES), b"")))
        with opened() as stream:
            beginning = _UntilLineEnd(without_mark(stream), int(total * (1 - self.held_out_end)))
            yield from text_documents(beginning, reading, skipped, held_out=False)
            if stream.peek(1):
                yield from text_documents(stream, reading, skipped, held_out=True)


class _UntilLineEnd:
    """The first bytes of a stream, up to the end of the line in which they end."""

    def __init__(self, stream: io.BufferedReader, size: int) -> None:
        self._stream = stream
        self._left = size
        self._ended = False

    def read(self, size: int, /) -> bytes:
        """See `Readable`; more than `size` only where the last line is longer."""
        if self._ended:
            return b""
        data = self._stream.read(min(size, self._left))
        self._left -= len(data)
        if not self._left:
            data += self._stream.readline()
            self._ended = True
        return data


def text_parts(
    file: TextFile, unit_bytes: int, held_out_end: float, cuts: TextCuts
) -> Iterator[FilePart | WholeFile]:
    """The parts of a file of plain text or records.

    Args:
        file: The file.
        unit_bytes: Bytes of a part, roughly.
        held_out_end: Share of a plain text to hold out.
        cuts: Where a plain text can be cut.
    """
    if not file.can_be_cut:
        yield WholeFile(file, 0.0 if file.is_jsonl else held_out_end)
    elif not file.size:
        yield FilePart(file, 0, 0)
    elif file.is_jsonl or not held_out_end:
        yield from _cut(file, 0, file.size, unit_bytes, None, cuts)
    else:
        boundary = _line_start(file, int(file.size * (1 - held_out_end)))
        yield from _cut(file, 0, boundary, unit_bytes, False, cuts)
        yield from _cut(file, boundary, file.size, unit_bytes, True, cuts)


def _cut(
    file: TextFile,
    start: int,
    stop: int,
    unit_bytes: int,
    held_out: bool | None,
    cuts: TextCuts,
) -> Iterator[FilePart]:
    """The bytes [start, stop) of a file in parts of about `unit_bytes`."""
    begins = True
    while start < stop:
        end, proven = stop, True
        if stop - start > unit_bytes:
            end, proven = _boundary(file, start + unit_bytes, cuts)
            end, proven = (end, proven) if end < stop else (stop, True)
        yield FilePart(file, start, end, held_out, end == stop, proven, begins)
        start, begins = end, False


def _boundary(file: TextFile, position: int, cuts: TextCuts) -> tuple[int, bool]:
    """A place to cut a file at or after `position`, and whether tokens stay as they are."""
    if file.is_jsonl:
        return _line_start(file, position), True
    if cuts.anywhere or not cuts.proven:
        return _line_start(file, position), cuts.proven
    context = min(position, 16)
    with open_bytes(file) as stream:
        stream.seek(position - context)
        data = stream.read(context)
        while block := stream.read(_LONGEST_LINE_SOUGHT):
            data = data[-context:] + block
            cut = cuts.find_in_bytes(data, context)
            if cut >= 0:
                return stream.tell() - len(data) + cut, True
            if stream.tell() - position > _LONGEST_UNCUT:
                return _line_start(file, position), False
    return file.size, True


def _line_start(file: TextFile, position: int) -> int:
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
                return position - 1 + _next_character(block)
    return file.size


def _next_character(block: bytes) -> int:
    """Offset, at least 1, of the first byte that is no UTF-8 continuation byte."""
    for offset in range(1, min(len(block), 5)):
        if not 0x80 <= block[offset] < 0xC0:
            return offset
    return len(block) if len(block) < 5 else 1  # end of the file, or not UTF-8
