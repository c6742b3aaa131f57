"""The documents of a stream that is read from its beginning to its end, in bounded memory."""

import codecs
import io
from collections.abc import Iterator
from typing import Protocol

from mhc_lightning.data.documents import (
    Document,
    ReadingOptions,
    Skipped,
    is_held_out,
    record_documents,
)
from mhc_lightning.data.file_formats import CSV, JSON_ARRAY, JSON_LINES, TSV, WARC
from mhc_lightning.data.formats.delimited import delimited_rows
from mhc_lightning.data.formats.json_arrays import array_items
from mhc_lightning.data.formats.web_archives import web_records
from mhc_lightning.data.record_text import BadRecord, json_record

# At least HASHED_BYTES, by the first of which a text's split is decided.
_BLOCK_BYTES = 1 << 22
_TAIL_BYTES = 1 << 18  # of a block, in which a cut is sought
_LONGEST_UNCUT = 1 << 26  # a text without any proven cut is cut all the same
_NOUNS = {JSON_LINES: "line", JSON_ARRAY: "item", CSV: "row", TSV: "row"}


class Readable(Protocol):
    """What a text is read from."""

    def read(self, size: int, /) -> bytes:
        """So many bytes, fewer only at the end."""


def stream_documents(
    stream: io.BufferedReader,
    file_format: str,
    name: str,
    reading: ReadingOptions,
    skipped: Skipped,
) -> Iterator[Document]:
    """The documents of a stream.

    Args:
        stream: The file, decompressed and in UTF-8.
        file_format: Its format, see `file_formats`: plain text or one of records.
        name: Name of the input, for error messages.
        reading: How to read it.
        skipped: Counts what is left out.

    Raises:
        UserError: The stream is damaged, or a record has no text.
    """
    if file_format == WARC:
        yield from _web_documents(stream, name, reading, skipped)
        return
    if file_format not in _NOUNS:
        yield from text_documents(without_mark(stream), reading, skipped)
        return
    if file_format == JSON_LINES:
        records = json_lines(without_mark(stream))
    elif file_format == JSON_ARRAY:
        records = array_items(stream, name)
    else:
        records = delimited_rows(stream, f".{file_format.lower()}", reading.text, name)
    noun = _NOUNS[file_format]
    yield from record_documents(
        records, lambda number: f"{noun} {number} of {name}", reading, skipped
    )


def without_mark(stream: io.BufferedReader) -> io.BufferedReader:
    """A stream at its beginning, behind a byte-order mark, which is no part of the text."""
    if stream.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return stream


def json_lines(lines: Iterator[bytes] | io.BufferedReader) -> Iterator[tuple[int, object]]:
    """The records of lines that are not empty, with the numbers of the lines from 1."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json_record(line)
            except BadRecord as bad:
                yield number, bad


def text_documents(
    stream: Readable, reading: ReadingOptions, skipped: Skipped, held_out: bool | None = None
) -> Iterator[Document]:
    """One document of plain text, in parts if it is long.

    Args:
        stream: The text, without a byte-order mark.
        reading: The share that is held out, and where a text can be cut.
        skipped: Counts empty texts.
        held_out: The split of the text; None if its content decides.
    """
    data = stream.read(_BLOCK_BYTES)
    if not data:
        skipped.empty_documents += 1
        return
    if held_out is None:
        held_out = is_held_out(data, reading.validation_fraction)
    begins = True
    while more := stream.read(_BLOCK_BYTES):
        data += more
        cut, proven = reading.cuts.part_end(data, len(data) - _TAIL_BYTES, _LONGEST_UNCUT)
        if cut:
            yield Document(data[:cut], held_out, ends=False, proven_cut=proven, begins=begins)
            data, begins = data[cut:], False
    yield Document(data, held_out, begins=begins)


def _web_documents(
    stream: io.BufferedReader, name: str, reading: ReadingOptions, skipped: Skipped
) -> Iterator[Document]:
    for _, data in web_records(stream, name, reading.max_expansion):
        if data is None:
            skipped.other_web_records += 1
        elif data:
            yield Document(data, is_held_out(data, reading.validation_fraction))
        else:
            skipped.empty_documents += 1
