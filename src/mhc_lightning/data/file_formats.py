"""The format of an input file, detected from its name and its first bytes.

Text has no signature, so a file is text unless it looks like something else: a table, a list of
documents in JSON, a web archive, an archive, a compressed or a binary file. A format that may hold
documents but is not read here is refused: its keys, quotes and headers would be trained on. A file
that is only binary, such as a picture in a folder of texts, is left out.
"""

import codecs
import json
import os
import re
from dataclasses import dataclass, replace
from typing import BinaryIO

from mhc_lightning.data.formats.compression import stem_of
from mhc_lightning.data.formats.delimited import column_names, delimiter_of
from mhc_lightning.data.formats.encodings import (
    CONTROL_BYTES,
    LARGEST_CONTROL_SHARE,
    decodes,
    utf8_of,
    wide_encoding,
)
from mhc_lightning.data.record_text import RecordText, field_names

PLAIN_TEXT = "plain text"
MARKED_TEXT = "plain text without its byte-order mark"
JSON_LINES = "JSON Lines"
JSON_ARRAY = "JSON array"
CSV = "CSV"
TSV = "TSV"
WARC = "WARC"
PARQUET = "Parquet"
ARROW = "Arrow"
ARROW_STREAM = "Arrow stream"
ZIP = "ZIP archive"
TAR = "tar archive"
BINARY = "binary"

TABLES = (PARQUET, ARROW, ARROW_STREAM)
ARCHIVES = (ZIP, TAR)
JSONL_SUFFIXES = (".jsonl", ".ndjson")
SAMPLE_BYTES = 1 << 16
_LONGEST_FIRST_LINE = 1 << 26

_TABLE = "write it as Parquet or JSON Lines"
_EXTRACT = "extract its text"
_DECOMPRESS = "decompress it, or compress it with gzip, zstd, bzip2 or xz"
_TWICE = "it is compressed twice; decompress it once"

# Name of the format, how to convert it if it is not read here, and the bytes that stand at an
# offset.
_SIGNATURES = (
    (PARQUET, "", 0, b"PAR1\x15"),
    (ARROW, "", 0, b"ARROW1\0\0"),
    (ARROW_STREAM, "", 0, b"\xff\xff\xff\xff"),
    ("Feather of version 1", _TABLE, 0, b"FEA1\0"),
    ("ORC", _TABLE, 0, b"ORC\x08"),
    ("ORC", _TABLE, 0, b"ORC\x0a"),
    ("Avro", _TABLE, 0, b"Obj\x01"),
    ("SQLite", _EXTRACT, 0, b"SQLite format 3\0"),
    ("HDF5", _EXTRACT, 0, b"\x89HDF\r\n\x1a\n"),
    ("PDF", _EXTRACT, 0, b"%PDF-"),
    ("RTF", _EXTRACT, 0, b"{\\rtf1"),
    ("gzip", _TWICE, 0, b"\x1f\x8b\x08"),
    ("zstd", _TWICE, 0, b"\x28\xb5\x2f\xfd"),
    ("bzip2", _TWICE, 4, b"1AY&SY"),
    ("xz", _TWICE, 0, b"\xfd7zXZ\0"),
    ("LZ4", _DECOMPRESS, 0, b"\x04\x22\x4d\x18"),
    (ZIP, "", 0, b"PK\x03\x04"),
    (ZIP, "", 0, b"PK\x05\x06"),  # an empty one
    ("7z", "unpack it", 0, b"7z\xbc\xaf\x27\x1c"),
    ("RAR", "unpack it", 0, b"Rar!\x1a\x07"),
    (TAR, "", 257, b"ustar\0"),
    (TAR, "", 257, b"ustar  \0"),
)
# Packed as ZIP, but no folder of texts.
_DOCUMENTS = (".docx", ".xlsx", ".pptx", ".odt", ".ods", ".odp", ".epub", ".pages", ".numbers")
_PROGRAMS = (".jar", ".apk", ".whl", ".npz", ".pt", ".pth", ".xpi", ".nupkg")
_CSV_SUFFIXES = {".csv": CSV, ".tsv": TSV}
_WEB_ARCHIVE = re.compile(rb"WARC/\d\.\d\r?\n")
_ARRAY_OF_OBJECTS = re.compile(rb'\s*\[\s*(?=\{\s*"(?:[^"\\\n]|\\.)*"\s*:)')


@dataclass(frozen=True)
class FileFormat:
    """The format of a file.

    Attributes:
        name: The format in words.
        conversion: How to convert a format that is not read here; empty for the others.
        encoding: The encoding of text that is not UTF-8, else empty.
    """

    name: str
    conversion: str = ""
    encoding: str = ""

    @property
    def description(self) -> str:
        """The format and, if it is not UTF-8, the encoding."""
        return f"{self.name} in {self.encoding}" if self.encoding else self.name


def sampled_format(stream: BinaryIO, name: str, text: RecordText) -> tuple[FileFormat, bytes]:
    """The format of a file from its first bytes, which are returned too.

    Args:
        stream: The file at its beginning, decompressed.
        name: Its name.
        text: The text of a record.
    """
    sample = stream.read(SAMPLE_BYTES)
    one_line = b"\n" not in sample and sample[:1] != b"["
    if one_line and stem_of(name).lower().endswith(".json"):
        sample += stream.readline(_LONGEST_FIRST_LINE)
    after = stream.read(1)
    return detect_format(name, sample, not after, text), sample + after


def detect_format(name: str, sample: bytes, whole: bool, text: RecordText) -> FileFormat:
    """The format of a file.

    Args:
        name: Name of the file; its ending counts, without that of a compression.
        sample: The first bytes, decompressed; `SAMPLE_BYTES` or more.
        whole: True if `sample` is the whole file.
        text: The text of a record.
    """
    suffix = os.path.splitext(stem_of(name).lower())[1]
    for format_name, conversion, offset, signature in _SIGNATURES:
        if sample.startswith(signature, offset):
            if format_name == ZIP and suffix in _DOCUMENTS:
                return FileFormat(f"a document ({suffix})", _EXTRACT)
            if format_name == ZIP and suffix in _PROGRAMS:
                return FileFormat(BINARY)
            return FileFormat(format_name, conversion)
    if _WEB_ARCHIVE.match(sample):
        return FileFormat(WARC)
    encoding = wide_encoding(sample)
    if encoding:
        detected = _detect_text(name, utf8_of(sample, encoding), whole, text)
        return replace(detected, encoding=encoding) if not detected.conversion else detected
    if _is_binary(sample) and suffix not in JSONL_SUFFIXES:
        return FileFormat(BINARY)
    return _detect_text(name, sample, whole, text)


def _detect_text(name: str, sample: bytes, whole: bool, wanted: RecordText) -> FileFormat:
    """The format of a text in UTF-8."""
    stem, suffix = os.path.splitext(stem_of(name).lower())
    if suffix in JSONL_SUFFIXES:
        return FileFormat(JSON_LINES)
    text = sample.removeprefix(codecs.BOM_UTF8)
    if suffix in _CSV_SUFFIXES and text.strip():
        return _detect_table(suffix, text, wanted)
    named = suffix == ".json" or stem.endswith(JSONL_SUFFIXES)
    rows = _objects(text, whole)
    if len(rows) >= (1 if named else 2):
        return _with_fields(JSON_LINES, rows[0], wanted)
    if (named and text.lstrip()[:1] == b"[") or _begins_array(text, whole):
        return _with_fields(JSON_ARRAY, _first_item(text), wanted)
    if named and text.lstrip()[:1] in (b"{", b'"'):
        return FileFormat(
            "JSON that is not one object per line", "write an array of objects, or JSON Lines"
        )
    return FileFormat(PLAIN_TEXT if len(text) == len(sample) else MARKED_TEXT)


def _detect_table(suffix: str, text: bytes, wanted: RecordText) -> FileFormat:
    header = text.decode("utf-8", errors="surrogateescape")
    columns = column_names(header, delimiter_of(suffix, wanted, header))
    missing = wanted.missing(columns)
    if missing:
        return FileFormat(
            f"{_CSV_SUFFIXES[suffix]} with the columns {field_names(columns)} and no {missing!r}",
            wanted.remedy(columns),
        )
    return FileFormat(_CSV_SUFFIXES[suffix])


def _with_fields(name: str, first: object, wanted: RecordText) -> FileFormat:
    """A format of records, if the first record (None: unknown) has the fields to read."""
    if isinstance(first, dict) and (missing := wanted.lacking(first)):
        return FileFormat(
            f"{name} with the fields {field_names(first)} and no {missing!r}", wanted.remedy(first)
        )
    return FileFormat(name)


def format_by_name(name: str) -> str:
    """The format that the name of a file alone suggests."""
    return JSON_LINES if stem_of(name).lower().endswith(JSONL_SUFFIXES) else PLAIN_TEXT


def _is_binary(sample: bytes) -> bool:
    """True if bytes are not text. UTF-8 may hold a few NULs, text in another encoding none."""
    control = len(sample) - len(sample.translate(None, CONTROL_BYTES))
    if control > LARGEST_CONTROL_SHARE * len(sample):
        return True
    return b"\0" in sample and not decodes(sample, "UTF-8")


def _begins_array(text: bytes, whole: bool) -> bool:
    """True if a text begins like a JSON array of objects."""
    opening = _ARRAY_OF_OBJECTS.match(text)
    if not opening:
        return False
    rest = text[opening.end() :].decode("utf-8", errors="surrogateescape")
    try:
        _, end = json.JSONDecoder().raw_decode(rest)
    except (ValueError, RecursionError):
        return not whole  # the first object is cut off
    return rest[end:].lstrip()[:1] in ("", ",", "]")


def _first_item(text: bytes) -> object:
    """The first item of a JSON array; None if it is cut off."""
    rest = text.lstrip()[1:].lstrip().decode("utf-8", errors="surrogateescape")
    try:
        return json.JSONDecoder().raw_decode(rest)[0]
    except (ValueError, RecursionError):
        return None


def _objects(text: bytes, whole: bool) -> list[dict[str, object]]:
    """The objects of a text whose lines are all non-empty JSON objects, else an empty list."""
    lines = text.split(b"\n")
    if not whole:
        lines.pop()  # cut off
    rows: list[dict[str, object]] = []
    for line in lines:
        if line.strip():
            if not line.lstrip().startswith(b"{"):
                return []
            try:
                row = json.loads(line.decode("utf-8", errors="surrogateescape"))
            except (ValueError, RecursionError):
                return []
            if not isinstance(row, dict) or not row:
                return []
            rows.append(row)
    return rows
