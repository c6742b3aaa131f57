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
from dataclasses import dataclass

PLAIN_TEXT = "plain text"
MARKED_TEXT = "plain text without its byte-order mark"
JSON_LINES = "JSON Lines"
BINARY = "binary"

COMPRESSED = (".gz", ".zst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
SAMPLE_BYTES = 1 << 16

_TABLE = "read it with input=hf://FOLDER (extra `datasets`), or write its text as JSON Lines"
_UNPACK = "unpack it"
_DECOMPRESS = "decompress it, or compress it with gzip or zstd"
_EXTRACT = "extract its text"
_RENAME = "give its name the ending"

# Name of the format, how to convert it, and the bytes that stand at an offset.
_SIGNATURES = (
    ("Parquet", _TABLE, 0, b"PAR1\x15"),
    ("Arrow", _TABLE, 0, b"ARROW1\0\0"),
    ("Arrow", _TABLE, 0, b"\xff\xff\xff\xff"),
    ("Feather", _TABLE, 0, b"FEA1\0"),
    ("ORC", _TABLE, 0, b"ORC\x08"),
    ("ORC", _TABLE, 0, b"ORC\x0a"),
    ("Avro", _TABLE, 0, b"Obj\x01"),
    ("SQLite", _EXTRACT, 0, b"SQLite format 3\0"),
    ("HDF5", _EXTRACT, 0, b"\x89HDF\r\n\x1a\n"),
    ("PDF", _EXTRACT, 0, b"%PDF-"),
    ("RTF", _EXTRACT, 0, b"{\\rtf1"),
    ("gzip", f"{_RENAME} .gz", 0, b"\x1f\x8b\x08"),
    ("zstd", f"{_RENAME} .zst", 0, b"\x28\xb5\x2f\xfd"),
    ("bzip2", _DECOMPRESS, 4, b"1AY&SY"),
    ("xz", _DECOMPRESS, 0, b"\xfd7zXZ\0"),
    ("LZ4", _DECOMPRESS, 0, b"\x04\x22\x4d\x18"),
    ("ZIP (or .docx, .epub, .xlsx)", _UNPACK, 0, b"PK\x03\x04"),
    ("7z", _UNPACK, 0, b"7z\xbc\xaf\x27\x1c"),
    ("RAR", _UNPACK, 0, b"Rar!\x1a\x07"),
    ("tar", _UNPACK, 257, b"ustar\0"),
    ("tar", _UNPACK, 257, b"ustar  \0"),
)
_TABLES = {".csv": "CSV", ".tsv": "TSV"}
_WEB_ARCHIVE = re.compile(rb"WARC/\d\.\d\r?\n")
_ARRAY_OF_OBJECTS = re.compile(rb'\s*\[\s*(?=\{\s*"(?:[^"\\\n]|\\.)*"\s*:)')
# Control characters without tabs, line ends, and the codes of terminals.
_CONTROL_BYTES = bytes({*range(32), 127} - {*b"\t\n\v\f\r\b\x1b"})
_LARGEST_CONTROL_SHARE = 0.05  # of a text's bytes; in compressed data, a tenth


@dataclass(frozen=True)
class FileFormat:
    """The format of a file.

    Attributes:
        name: The format in words.
        conversion: How to convert a format that is not read here; empty for the others.
    """

    name: str
    conversion: str = ""


def detect_format(name: str, sample: bytes, whole: bool, text_field: str) -> FileFormat:
    """The format of a file.

    Args:
        name: Name of the file; its ending counts, without that of a compression.
        sample: The first bytes, decompressed; `SAMPLE_BYTES` or more.
        whole: True if `sample` is the whole file.
        text_field: The key of the text in JSON Lines.
    """
    stem, suffix = os.path.splitext(stem_of(name).lower())
    for format_name, conversion, offset, signature in _SIGNATURES:
        if sample.startswith(signature, offset):
            return FileFormat(format_name, conversion)
    encoding = _wide_encoding(sample)
    if encoding:
        return FileFormat(f"{encoding} text", f"convert it with `iconv -f {encoding} -t UTF-8`")
    if suffix in JSONL_SUFFIXES:
        return FileFormat(JSON_LINES)
    if _is_binary(sample):
        return FileFormat(BINARY)
    text = sample.removeprefix(codecs.BOM_UTF8)
    if suffix in _TABLES and text.strip():
        return FileFormat(_TABLES[suffix], _TABLE)
    if _WEB_ARCHIVE.match(text):
        return FileFormat("WARC", _EXTRACT)
    named = suffix == ".json" or stem.endswith(JSONL_SUFFIXES)
    rows = _objects(text, whole)
    if len(rows) >= (1 if named else 2):
        if text_field in rows[0]:
            return FileFormat(JSON_LINES)
        keys = ", ".join(map(repr, list(rows[0])[:5]))
        return FileFormat(
            f"JSON Lines with the fields {keys} and no {text_field!r}", "name one with text_field=…"
        )
    if (named and text.lstrip()[:1] == b"[") or _begins_array(text, whole):
        return FileFormat("a JSON array", _TABLE)
    if named and text.lstrip()[:1] in (b"{", b'"'):
        return FileFormat("JSON that is not one object per line", _TABLE)
    return FileFormat(PLAIN_TEXT if len(text) == len(sample) else MARKED_TEXT)


def stem_of(name: str) -> str:
    """A file name without the ending of a compression."""
    return name[: len(name) - len(compression_of(name))]


def compression_of(name: str) -> str:
    """`.gz`, `.zst` or an empty string, by the file name."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix in COMPRESSED else ""


def format_by_name(name: str) -> str:
    """The format that the name of a file alone suggests."""
    return JSON_LINES if stem_of(name).lower().endswith(JSONL_SUFFIXES) else PLAIN_TEXT


def _is_binary(sample: bytes) -> bool:
    """True if bytes are not text. UTF-8 may hold a few NULs, text in another encoding none."""
    control = len(sample) - len(sample.translate(None, _CONTROL_BYTES))
    if control > _LARGEST_CONTROL_SHARE * len(sample):
        return True
    return b"\0" in sample and not _decodes(sample, "UTF-8")


def _wide_encoding(sample: bytes) -> str:
    """The encoding of UTF-16 or UTF-32 text, else an empty string.

    Without a mark, most high bytes of such a text are zero.
    """
    for encoding, mark in (
        ("UTF-32", codecs.BOM_UTF32_LE),  # its mark begins with that of UTF-16
        ("UTF-32", codecs.BOM_UTF32_BE),
        ("UTF-16", codecs.BOM_UTF16_LE),
        ("UTF-16", codecs.BOM_UTF16_BE),
    ):
        if sample.startswith(mark) and _decodes(sample, encoding):
            return encoding
    for encoding, zeros in (("UTF-16LE", sample[1::2]), ("UTF-16BE", sample[::2])):
        if len(zeros) > 8 and zeros.count(0) > 0.7 * len(zeros) and _decodes(sample, encoding):
            return encoding
    return ""


def _decodes(sample: bytes, encoding: str) -> bool:
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return False
    return sum(map(text.count, map(chr, _CONTROL_BYTES))) <= _LARGEST_CONTROL_SHARE * len(text)


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
