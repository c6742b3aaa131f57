"""The format of a file is detected from its name and first bytes, or refused."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from mhc_lightning.data.documents import Skipped
from mhc_lightning.data.file_formats import detect_format
from mhc_lightning.data.input_files import find_input_files
from mhc_lightning.data.work_units import plan_units
from mhc_lightning.errors import UserError

TEXTS = [
    "First, with a comma.\n",
    'A "quoted" one\r\nof two lines',
    "Größe, 日本語 🎉",
    "tab\there",
]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "\n".join(json.dumps(row) for row in ROWS).encode()


def table(delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue().encode()


def archive(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as folder:
            folder.writestr("a.txt", TEXTS[0])
    else:
        with tarfile.open(fileobj=stream, mode="w") as folder:
            entry = tarfile.TarInfo("a.txt")
            entry.size = 5
            folder.addfile(entry, io.BytesIO(b"hello"))
    return stream.getvalue()


def arrow(kind: str) -> bytes:
    import pyarrow

    rows = pyarrow.Table.from_pylist(ROWS)
    stream = io.BytesIO()
    if kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(rows, stream)
    elif kind == "feather":
        import pyarrow.feather

        pyarrow.feather.write_feather(rows, stream, version=1)
    else:
        make = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with make(stream, rows.schema) as writer:
            writer.write_table(rows)
    return stream.getvalue()


WARC = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 5\r\n\r\nhello\r\n\r\n"
PROSE = "\n".join(TEXTS) * 50

ROWS_OF = ("a.jsonl", "a.ndjson", "a.json", "a.jsonl.txt", "a.jsonl.part", "a", "a.txt")

REFUSED: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "array.json": (json.dumps(ROWS).encode(), "a JSON array"),
    "pretty.json": (json.dumps(ROWS, indent=2).encode(), "a JSON array"),
    "array.txt": (json.dumps(ROWS).encode(), "a JSON array"),
    "strings.json": (json.dumps(TEXTS).encode(), "a JSON array"),
    "columns.json": (
        json.dumps({"text": TEXTS}, indent=1).encode(),
        "JSON that is not one object per line",
    ),
    "other.json": (b'{"body": "x"}\n{"body": "y"}\n', "JSON Lines with the fields 'body'"),
    "log.txt": (b'{"ts": 1}\n{"ts": 2}\n', "JSON Lines with the fields 'ts' and no 'text'"),
    "a.csv": (table(","), "CSV"),
    "one_column.csv": (b"text\nhello\n", "CSV"),
    "a.csv.gz": (gzip.compress(table(",")), "CSV"),
    "a.tsv": (table("\t"), "TSV"),
    "a.warc": (WARC, "WARC"),
    "a.warc.gz": (gzip.compress(WARC) + gzip.compress(WARC), "WARC"),
    "a.warc.wet.gz": (gzip.compress(WARC), "WARC"),
    "a.parquet": (lambda: arrow("parquet"), "Parquet"),
    "a.arrow": (lambda: arrow("file"), "Arrow"),
    "stream.arrow": (lambda: arrow("stream"), "Arrow"),
    "a.feather": (lambda: arrow("feather"), "Feather"),
    "a.jsonl.bz2": (bz2.compress(LINES), "bzip2"),
    "a.jsonl.xz": (lzma.compress(LINES), "xz"),
    "a.zip": (archive("zip"), "ZIP"),
    "a.tar": (archive("tar"), "tar"),
    "a.tar.gz": (gzip.compress(archive("tar")), "tar"),
    "a.tgz": (gzip.compress(archive("tar")), "gzip"),
    "unnamed": (zstandard.compress(LINES), "zstd"),
    "utf16.txt": (PROSE.encode("utf-16"), "UTF-16 text"),
    "utf16be.txt": (b"\xfe\xff" + PROSE.encode("utf-16-be"), "UTF-16 text"),
    "unmarked.txt": ("plain words\n".encode("utf-16-le") * 9, "UTF-16LE text"),
    "utf16.jsonl": (LINES.decode().encode("utf-16"), "UTF-16 text"),
    "utf32.txt": (PROSE.encode("utf-32"), "UTF-32 text"),
    "a.pdf": (b"%PDF-1.7\n%\xe2\xe3\n1 0 obj", "PDF"),
}


def write(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def documents(path: Path) -> list[bytes]:
    skipped = Skipped()
    units = plan_units(find_input_files([path]), 10**6, 0.0)
    return [document.data for unit in units for document in unit.documents("text", 0.0, skipped)]


@pytest.mark.parametrize("name", REFUSED)
def test_other_forms_are_refused_by_name(tmp_path: Path, name: str) -> None:
    data, form = REFUSED[name]
    path = write(tmp_path, name, data() if callable(data) else data)
    for given in (path, tmp_path):
        with pytest.raises(UserError) as caught:
            find_input_files([given])
        assert f"{path} looks like {form}" in str(caught.value)
    (file,) = find_input_files([path], as_text=["*"])
    assert file.format == "plain text"


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ROWS_OF)
def test_json_lines_are_read_whatever_their_name(
    tmp_path: Path, name: str, mark: bytes, compress: Callable[[bytes], bytes]
) -> None:
    ending = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[compress]
    for lines in (LINES, LINES.replace(b"\n", b"\r\n") + b"\r\n"):
        path = write(tmp_path, name + ending, compress(mark + lines))
        assert documents(path) == [text.encode() for text in TEXTS]


def test_one_long_line_of_json_is_a_line(tmp_path: Path) -> None:
    row = json.dumps({"text": "long " * 100_000}).encode()
    assert documents(write(tmp_path, "a.json", row)) == [b"long " * 100_000]
    assert len(documents(write(tmp_path, "b.json", row + b"\n" + row))) == 2


@pytest.mark.parametrize(
    "name, text",
    {
        "a.txt": PROSE,
        "names.txt": "name, age, place\nAnn, 3, here\nBob, 4, there\n" * 20,
        "tabs.txt": "name\tage\nAnn\t3\n" * 20,
        "a.py": '[{"a": 1}.get("a")]\nx = {"text": 1}\n',
        "dictionary.py": "{'text': 1}\n{'text': 2}\n",
        "a.c": "#include <stdio.h>\nint main(void) { return 0; }\n",
        "braces.txt": "{}\n{}\n",
        "a.md": "[link](x)\n\n* {not} json\n``\n{}\n``\n",
        "a.log": "[2024-01-01 00:00:00] INFO started\n\x1b[31mred\x1b[0m\n" * 9,
        "a.ini": "[section]\nkey = value\n",
        "a.xml": '<?xml version="1.0"?><a>b</a>',
        "a.html": "<html><body>hello</body></html>",
        "one.txt": '{"text": "only one line, so it may be anything"}',
        "prose.json": "This is no JSON at all.\n",
        "empty.json": "",
        "empty.csv": "",
        "par.txt": "PAR1 is a gene, and ORC a monster. Obj, too.\n",
        "warc.txt": "WARC/1.0 is a format.\n",
        "page.txt": "one page\fanother page\f",
        "README": "hello",
        "unknown.xyz": "hello",
    }.items(),
)
def test_plain_text_is_taken_as_it_is(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path, name, text.encode())
    assert find_input_files([path])[0].format == "plain text"
    assert documents(path) == ([text.encode()] if text else [])


def test_texts_in_other_encodings_are_no_binaries() -> None:
    for encoding, text in (
        ("latin-1", "café déjà vu " * 99),
        ("cp1251", "Мама мыла раму. " * 99),
        ("shift-jis", "日本語の文章です。" * 99),
        ("gb18030", "这是一个句子。" * 99),
        ("koi8-r", "Мама мыла раму. " * 99),
    ):
        detected = detect_format("a.txt", text.encode(encoding), True, "text")
        assert detected.name == "plain text", encoding


def test_compressed_and_random_bytes_are_binary() -> None:
    generator = random.Random(0)
    for size in (400, 1000, 65_536):
        assert detect_format("a", generator.randbytes(size), True, "text").name == "binary"
    strings = b"a docstring of some length in a compiled module, " * 20 + b"\xe3\0\0\0"
    assert detect_format("a.pyc", strings, True, "text").name == "binary"
    assert detect_format("a.so", b"ELF\0\0abc", True, "text").name == "binary"


def test_the_form_follows_from_the_beginning_alone() -> None:
    line = json.dumps({"text": "x" * 900}).encode() + b"\n"
    assert detect_format("a.json", (line * 100)[: 1 << 16], False, "text").name == "JSON Lines"
    assert detect_format("a.txt", line + b'{"text": "cut o', False, "text").name == "plain text"
    assert detect_format("a.txt", line * 2 + b'{"text": "cut o', False, "text").name == "JSON Lines"
