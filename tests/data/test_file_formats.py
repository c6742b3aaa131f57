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

from mhc_lightning.data.documents import ReadingLog, ReadingOptions
from mhc_lightning.data.file_formats import detect_format
from mhc_lightning.data.input_files import find_input_files
from mhc_lightning.data.record_text import RecordText
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


PROSE = "\n".join(TEXTS) * 50

ROWS_OF = ("a.jsonl", "a.ndjson", "a.json", "a.jsonl.txt", "a.jsonl.part", "a", "a.txt")

REFUSED: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "columns.json": (
        json.dumps({"text": TEXTS}, indent=1).encode(),
        "JSON that is not one object per line",
    ),
    "other.json": (b'{"body": "x"}\n{"body": "y"}\n', "JSON Lines with the fields 'body'"),
    "array.json": (b'[{"body": "x"}, {"body": "y"}]', "JSON array with the fields 'body'"),
    "log.txt": (b'{"ts": 1}\n{"ts": 2}\n', "JSON Lines with the fields 'ts' and no 'text'"),
    "a.csv": (b"name,age\nAnn,3\n", "CSV with the columns 'name', 'age' and no 'text'"),
    "semicolons.csv": (b"name;age\nAnn;3\n", "CSV with the columns 'name;age' and no 'text'"),
    "a.tsv": (b"name\tage\nAnn\t3\n", "TSV with the columns 'name', 'age' and no 'text'"),
    "utf16.csv": ("name,age\n".encode("utf-16"), "CSV with the columns 'name', 'age'"),
    "a.parquet.gz": (lambda: gzip.compress(arrow("parquet")), "Parquet that is compressed"),
    "a.zip.gz": (gzip.compress(archive("zip")), "ZIP archive that is compressed"),
    "a.feather": (lambda: arrow("feather"), "Feather of version 1"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINES)), "gzip: it is compressed twice"),
    "twice.xz": (lzma.compress(bz2.compress(LINES)), "bzip2: it is compressed twice"),
    "a.lz4": (b"\x04\x22\x4d\x18" + bytes(range(100)), "LZ4"),
    "a.docx": (archive("zip"), "a document (.docx): extract its text"),
    "a.pdf": (b"%PDF-1.7\n%\xe2\xe3\n1 0 obj", "PDF"),
}
READ: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "array.json": (json.dumps(ROWS).encode(), "JSON array"),
    "marked.json": (b"\xef\xbb\xbf" + json.dumps(ROWS).encode(), "JSON array"),
    "pretty.json": (json.dumps(ROWS, indent=2).encode(), "JSON array"),
    "array.txt": (json.dumps(ROWS).encode(), "JSON array"),
    "strings.json": (json.dumps(TEXTS).encode(), "JSON array"),
    "a.csv": (table(","), "CSV"),
    "semicolons.csv": (table(";"), "CSV"),
    "marked.csv": (b"\xef\xbb\xbf" + table(","), "CSV"),
    "a.csv.gz": (gzip.compress(table(",")), "CSV"),
    "a.tsv": (table("\t"), "TSV"),
    "a.parquet": (lambda: arrow("parquet"), "Parquet"),
    "unnamed": (lambda: arrow("parquet"), "Parquet"),
    "a.arrow": (lambda: arrow("file"), "Arrow"),
    "v2.feather": (lambda: arrow("file"), "Arrow"),
    "stream.arrow": (lambda: arrow("stream"), "Arrow stream"),
    "a.jsonl.bz2": (bz2.compress(LINES[:50]) + bz2.compress(LINES[50:]), "JSON Lines"),
    "a.jsonl.xz": (lzma.compress(LINES[:50]) + lzma.compress(LINES[50:]), "JSON Lines"),
    "gzipped": (gzip.compress(LINES), "JSON Lines"),
    "zstandard": (zstandard.compress(LINES), "JSON Lines"),
    "bzipped": (bz2.compress(LINES), "JSON Lines"),
    "xzipped": (lzma.compress(LINES), "JSON Lines"),
    "utf16.jsonl": (LINES.decode().encode("utf-16"), "JSON Lines in UTF-16"),
    "utf16.json": (json.dumps(ROWS).encode("utf-16"), "JSON array in UTF-16"),
    "utf16.csv": (table(",").decode().encode("utf-16"), "CSV in UTF-16"),
    "utf32.tsv": (table("\t").decode().encode("utf-32"), "TSV in UTF-32"),
    "utf32.jsonl.gz": (gzip.compress(LINES.decode().encode("utf-32")), "JSON Lines in UTF-32"),
}
WIDE = {
    "utf16.txt": (PROSE.encode("utf-16"), "UTF-16"),
    "utf16be.txt": (b"\xfe\xff" + PROSE.encode("utf-16-be"), "UTF-16"),
    "unmarked.txt": (PROSE.replace("日本語 🎉", "").encode("utf-16-le"), "UTF-16LE"),
    "unmarked be.txt": (PROSE.replace("日本語 🎉", "").encode("utf-16-be"), "UTF-16BE"),
    "utf32.txt": (PROSE.encode("utf-32"), "UTF-32"),
    "utf32be.txt.xz": (lzma.compress(b"\0\0\xfe\xff" + PROSE.encode("utf-32-be")), "UTF-32"),
}


def write(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def documents(path: Path) -> list[bytes]:

    units = plan_units(find_input_files([path]), 10**6, ReadingOptions())
    return [
        document.data
        for unit in units
        for document in unit.documents(ReadingOptions(), ReadingLog())
    ]


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


@pytest.mark.parametrize("name", READ)
def test_records_are_read_whatever_they_are_written_in(tmp_path: Path, name: str) -> None:
    data, form = READ[name]
    path = write(tmp_path, name, data() if callable(data) else data)
    (file,) = find_input_files([path])
    assert file.description == form
    assert documents(path) == [text.encode() for text in TEXTS]


@pytest.mark.parametrize("name", WIDE)
def test_wide_encodings_are_read_as_utf8(tmp_path: Path, name: str) -> None:
    data, encoding = WIDE[name]
    path = write(tmp_path, name, data)
    assert find_input_files([path])[0].description == f"plain text in {encoding}"
    expected = PROSE if encoding in ("UTF-16", "UTF-32") else PROSE.replace("日本語 🎉", "")
    assert documents(path) == [expected.encode()]


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
        detected = detect_format("a.txt", text.encode(encoding), True, RecordText())
        assert detected.name == "plain text", encoding


def test_compressed_and_random_bytes_are_binary() -> None:
    generator = random.Random(0)
    for size in (400, 1000, 65_536):
        assert detect_format("a", generator.randbytes(size), True, RecordText()).name == "binary"
    strings = b"a docstring of some length in a compiled module, " * 20 + b"\xe3\0\0\0"
    assert detect_format("a.pyc", strings, True, RecordText()).name == "binary"
    assert detect_format("a.so", b"ELF\0\0abc", True, RecordText()).name == "binary"


def test_the_form_follows_from_the_beginning_alone() -> None:
    line = json.dumps({"text": "x" * 900}).encode() + b"\n"

    def form(name: str, sample: bytes) -> str:
        return detect_format(name, sample, False, RecordText()).name

    assert form("a.json", (line * 100)[: 1 << 16]) == "JSON Lines"
    assert form("a.txt", line + b'{"text": "cut o') == "plain text"
    assert form("a.txt", line * 2 + b'{"text": "cut o') == "JSON Lines"
