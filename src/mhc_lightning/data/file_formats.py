"""What a file holds, judged by its name and by how it begins.

Text has no signature, so that everything is text that does not look like something else: a table, a
list of documents in JSON, a web archive, an archive, a compressed or a binary file. What could hold
documents and cannot be read here is refused, because its keys, quotes and headers would be trained
on; what is only binary, such as a picture in a folder of texts, is left out.
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

# Format, how to mend, offset, and the bytes that are found there.
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
_NO_TEXT = bytes({*range(32), 127} - {*b"\t\n\v\f\r\b\x1b"})  # tabs, ends of lines, terminals
_MOST_NO_TEXT = 0.05  # of the bytes; in compressed data a tenth are such


@dataclass(frozen=True)
class Form:
    """What a file was taken for.

    Attributes:
        name: In words.
        mending: What to do about a form that cannot be read; empty for the others.
    """

    name: str
    mending: str = ""


def form_of(name: str, sample: bytes, whole: bool, text_field: str) -> Form:
    """What a file holds.

    Args:
        name: The file's; its ending counts, less that of a compression.
        sample: How it begins, decompressed; :data:`SAMPLE_BYTES` or more.
        whole: Whether that is all of it.
        text_field: The key of the text in JSON Lines; without it lines of a file that has another
            name are no documents.
    """
    stem, suffix = os.path.splitext(stem_of(name).lower())
    for form, mending, offset, signature in _SIGNATURES:
        if sample.startswith(signature, offset):
            return Form(form, mending)
    encoding = _wide_encoding(sample)
    if encoding:
        return Form(f"{encoding} text", f"convert it with `iconv -f {encoding} -t UTF-8`")
    if suffix in JSONL_SUFFIXES:
        return Form(JSON_LINES)
    if _is_binary(sample):
        return Form(BINARY)
    text = sample.removeprefix(codecs.BOM_UTF8)
    if suffix in _TABLES and text.strip():
        return Form(_TABLES[suffix], _TABLE)
    if _WEB_ARCHIVE.match(text):
        return Form("WARC", _EXTRACT)
    named = suffix == ".json" or stem.endswith(JSONL_SUFFIXES)
    rows = _objects(text, whole)
    if len(rows) >= (1 if named else 2):
        if text_field in rows[0]:
            return Form(JSON_LINES)
        keys = ", ".join(map(repr, list(rows[0])[:5]))
        return Form(
            f"JSON Lines with the fields {keys} and no {text_field!r}", "name one with text_field=…"
        )
    if (named and text.lstrip()[:1] == b"[") or _begins_array(text, whole):
        return Form("a JSON array", _TABLE)
    if named and text.lstrip()[:1] in (b"{", b'"'):
        return Form("JSON that is not one object per line", _TABLE)
    return Form(PLAIN_TEXT if len(text) == len(sample) else MARKED_TEXT)


def stem_of(name: str) -> str:
    """A name without the ending of a compression."""
    return name[: len(name) - len(compression_of(name))]


def compression_of(name: str) -> str:
    """``.gz``, ``.zst`` or nothing."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix in COMPRESSED else ""


def form_by_name(name: str) -> str:
    """The form that a file's name alone lets expect."""
    return JSON_LINES if stem_of(name).lower().endswith(JSONL_SUFFIXES) else PLAIN_TEXT


def _is_binary(sample: bytes) -> bool:
    """Whether bytes are no text; one in UTF-8 may have a few NULs, one in another encoding none."""
    no_text = len(sample) - len(sample.translate(None, _NO_TEXT))
    if no_text > _MOST_NO_TEXT * len(sample):
        return True
    return b"\0" in sample and not _decodes(sample, "UTF-8")


def _wide_encoding(sample: bytes) -> str:
    """UTF-16 or UTF-32, if a text is in one of these; most of its zeros are on one side then."""
    for encoding, mark in (
        ("UTF-32", codecs.BOM_UTF32_LE),  # begins as that of UTF-16 does
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
    return sum(map(text.count, map(chr, _NO_TEXT))) <= _MOST_NO_TEXT * len(text)


def _begins_array(text: bytes, whole: bool) -> bool:
    """Whether a text begins as a JSON array of objects does."""
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
    """The lines of a text if all are JSON objects with something in them; else none."""
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
