"""Rows of CSV and TSV, with quotes, ragged rows, and columns that are missing."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from mhc_lightning.data.documents import ReadingLog
from mhc_lightning.data.formats import delimited
from mhc_lightning.data.record_text import RecordText
from mhc_lightning.errors import UserError

Read = Callable[..., tuple[list[bytes], ReadingLog]]
TEXTS = ["plain", 'with "quotes"', "two\nlines", "two\r\nlines", "a,b;c\td", "é 🎉", "", " spaces "]


def table(delimiter: str, line_end: str = "\r\n") -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=line_end)
    writer.writerow(["id", "text", "note"])
    writer.writerows([number, text, "x"] for number, text in enumerate(TEXTS))
    return stream.getvalue().encode()


@pytest.mark.parametrize("line_end", ["\r\n", "\n"])
@pytest.mark.parametrize("name, delimiter", [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_rows_come_as_they_were_written(
    tmp_path: Path, read: Read, name: str, delimiter: str, line_end: str
) -> None:
    path = tmp_path / name
    path.write_bytes(table(delimiter, line_end))
    documents, log = read(path)
    assert documents == [text.encode() for text in TEXTS if text]
    assert log.skipped.empty_documents == 1


def test_columns_are_joined_and_invalid_utf8_is_kept(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"title,body\n\nT\xff,B\n,only\n,\n")
    documents, log = read(path, text=RecordText(template="{title}: {body}"))
    assert documents == [b"T\xff: B", b": only"]
    assert log.skipped.empty_documents == 1


def test_ragged_rows_and_stray_quotes_are_bad_records(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,b\none,1\ntwo\nthree,3,4\nfour,"x"y\nfive,5\n')
    with pytest.raises(
        UserError,
        match=r"row 2 of .*a\.csv has 1 fields, and the first row names 2 \('text', 'b'\); mend",
    ):
        read(path)
    documents, log = read(path, skip_bad_records=True)
    assert documents == [b"one", b"five"]
    assert log.skipped.bad_records == 3
    path.write_bytes(b'text,b\none,1\n"never closed,2\nthree,3\n')
    with pytest.raises(UserError, match=r"row 2 of .*a\.csv is no row of CSV \(unexpected end"):
        read(path)


def test_columns_have_to_be_there_once(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,text\na,b\n")
    with pytest.raises(UserError, match="has several columns 'text'"):
        read(path)
    path.write_bytes(b"name\nAnn\n")
    with pytest.raises(UserError, match="CSV with the columns 'name' and no 'text': name one"):
        read(path)
    assert read(path, text=RecordText("name"))[0] == [b"Ann"]
    path.write_bytes(b"text\n")
    assert read(path)[0] == []


def test_a_field_has_a_largest_size(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "_LONGEST_FIELD", 1000)
    path = tmp_path / "a.csv"
    path.write_bytes(b'text\n"' + b"never closed\n" * 1000)
    with pytest.raises(UserError, match="field larger than field limit"):
        read(path)
