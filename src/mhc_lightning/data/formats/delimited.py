"""Rows of CSV and TSV: fields in quotes where they need it, names of columns in the first row."""

import csv
import io
import itertools
from collections.abc import Iterator
from typing import BinaryIO

from mhc_lightning.data.record_text import BadRecord, RecordText, field_names
from mhc_lightning.errors import UserError

_LONGEST_FIELD = 1 << 30  # characters; a quote that is never closed would take in the whole file


def delimiter_of(suffix: str, text: RecordText, header: str) -> str:
    """What separates the columns: a tab in TSV, a comma or a semicolon in CSV.

    Args:
        suffix: `.csv` or `.tsv`.
        text: The fields to read; a semicolon is chosen if it alone finds them.
        header: The beginning of the file, with its first row.
    """
    if suffix == ".tsv":
        return "\t"
    found = [mark for mark in ",;" if not text.missing(_first_row(header, mark))]
    return found[0] if found else ","


def column_names(header: str, delimiter: str) -> list[str]:
    """Names of the columns, from the beginning of the file."""
    return _first_row(header, delimiter)


def _first_row(header: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(header, newline=""), delimiter=delimiter), [])
    except csv.Error:
        return []


def delimited_rows(
    stream: BinaryIO, suffix: str, text: RecordText, name: str
) -> Iterator[tuple[int, object]]:
    """The rows of a table as dictionaries, numbered from 1; invalid UTF-8 in them is kept.

    A row with more or fewer fields than the first row, or with a stray quote, is a `BadRecord`.
    Empty lines are no rows.

    Args:
        stream: UTF-8, with or without a byte-order mark.
        suffix: See `delimiter_of`.
        text: See `delimiter_of`.
        name: Name of the input, for error messages.

    Raises:
        UserError: The header names a column that is asked for twice.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    first = _decoded(stream.readline()).removeprefix("\ufeff")
    lines = itertools.chain([first], map(_decoded, stream))
    rows = csv.reader(lines, delimiter=delimiter_of(suffix, text, first), strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            number += 1
            yield number, BadRecord(f"is no row of {suffix[1:].upper()} ({error}); mend its quotes")
            continue
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = row
            twice = [column for column in text.fields if header.count(column) > 1]
            if twice:
                raise UserError(
                    f"input {name} has several columns {twice[0]!r}; give each a name of its own"
                )
            continue
        number += 1
        if len(row) == len(header):
            yield number, dict(zip(header, row, strict=True))
        else:
            yield (
                number,
                BadRecord(
                    f"has {len(row)} fields, and the first row names {len(header)}"
                    f" ({field_names(header)}); mend it"
                ),
            )


def _decoded(line: bytes) -> str:
    return line.decode("utf-8", errors="surrogateescape")
