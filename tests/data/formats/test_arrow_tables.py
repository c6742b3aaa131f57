"""Parquet and Arrow: nested and foreign columns, parts, damage, and a missing extra."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from mhc_lightning.data.conversation_text import ConversationText
from mhc_lightning.data.documents import ReadingLog
from mhc_lightning.data.record_text import RecordText
from mhc_lightning.errors import UserError

Read = Callable[..., tuple[list[bytes], ReadingLog]]
TEXTS = [f"row {number} é " * (1 + number % 7) for number in range(500)]
KINDS = ("parquet", "arrow", "stream")


def write(path: Path, table: Any, kind: str, rows: int = 60) -> Path:
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=rows)
    else:
        make = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit_bytes", [1, 3000, 10**9])
def test_every_row_comes_once_in_order(
    tmp_path: Path, read: Read, kind: str, unit_bytes: int
) -> None:
    table = pyarrow.table({"id": range(500), "text": TEXTS})
    documents, _ = read(write(tmp_path / "x", table, kind), unit_bytes)
    assert documents == [text.encode() for text in TEXTS]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_any_type_of_text_nested_or_not(tmp_path: Path, read: Read, kind: str) -> None:
    texts = ["a", None, "", "é" * 9]
    arrays = {
        "text": pyarrow.array(texts),
        "large": pyarrow.array(texts, pyarrow.large_string()),
        "words": pyarrow.array(texts).dictionary_encode(),
        "data": pyarrow.array([{"text": text, "n": 1} for text in texts[:3]] + [None]),
        "dotted.name": pyarrow.array(texts),
        "bytes": pyarrow.array([text and text.encode() for text in texts]),
    }
    path = write(tmp_path / "x", pyarrow.table(arrays), kind)
    for field in ("text", "large", "words", "dotted.name", "bytes"):
        documents, log = read(path, text=RecordText(field))
        assert documents == [b"a", "é".encode() * 9]
        assert log.skipped.empty_documents == 2
    assert read(path, text=RecordText("data.text"))[0] == [b"a"]
    joined = read(path, text=RecordText(template="{text}-{data.text}"))[0]
    assert joined == [b"a-a", ("é" * 9 + "-").encode()]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_text_is_said(tmp_path: Path, read: Read, kind: str) -> None:
    table = pyarrow.table({"text": TEXTS, "n": range(500), "list": [["a"]] * 500})
    path = write(tmp_path / "x", table, kind)
    with pytest.raises(UserError, match="x has no column 'body' but 'text', 'n', 'list'; name one"):
        read(path, text=RecordText("body"))
    with pytest.raises(UserError, match=r"no column 'messages' .*; conversations are in"):
        read(path, text=ConversationText())
    tokens = write(tmp_path / "t", pyarrow.table({"input_ids": [[1, 2]] * 9}), kind)
    with pytest.raises(UserError, match=r"t has no column 'text' .*'input_ids', are not prepared"):
        read(tokens)
    with pytest.raises(UserError, match=r"row 1 of .*x has a field 'n' that is int, not text"):
        read(path, text=RecordText("n"))
    with pytest.raises(UserError, match=r"that is list, not text"):
        read(path, text=RecordText("list"))
    with pytest.raises(UserError, match=r"row 1 of .* has no field 'text\.inner'"):
        read(path, text=RecordText("text.inner"))
    mixed = pyarrow.table({"text": [b"good"] * 120 + [b"\xff"] + [b"also good"] * 3})
    path = write(tmp_path / "y", mixed, kind)
    with pytest.raises(UserError, match=r"row 121 of .*y has a field 'text' of bytes"):
        read(path, 1)
    assert read(path, skip_bad_records=True)[1].skipped.bad_records == 1


def test_invalid_utf8_in_a_column_of_text_is_a_bad_record(tmp_path: Path, read: Read) -> None:
    text = pyarrow.array([b"a", b"\xff", b"b"]).view(pyarrow.string())
    path = write(tmp_path / "x", pyarrow.table({"text": text}), "parquet")
    with pytest.raises(UserError, match=r"row 2 of .*x is not UTF-8"):
        read(path)
    assert read(path, skip_bad_records=True)[0] == [b"a", b"b"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, read: Read, kind: str) -> None:
    path = write(tmp_path / "x", pyarrow.table({"text": TEXTS}), kind)
    data = path.read_bytes()
    for size in (100, len(data) // 2, len(data) - 20):
        path.write_bytes(data[:size])
        if kind == "stream" and size == len(data) - 20:  # within its end mark
            continue
        with pytest.raises(UserError, match=r"x is a damaged (Parquet|Arrow|Arrow stream) file"):
            read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_never_gives_other_text(tmp_path: Path, read: Read, kind: str) -> None:
    """Offsets that were changed must not crash, or read memory that is not the file's."""
    table = pyarrow.table({"text": TEXTS})
    path = write(tmp_path / "x", table, kind)
    data = path.read_bytes()
    for position in range(200, len(data) - 200, len(data) // 40):
        path.write_bytes(data[:position] + b"\xff\xff\xff\x7f" + data[position + 4 :])
        try:
            documents, _ = read(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert sum(map(len, documents)) < 2 * len(data) + 10**6


def test_memory_is_bounded_by_a_few_rows(tmp_path: Path) -> None:
    """One row group of 60 MB of texts of 30 kB each, read by a process of its own."""
    import random

    path = tmp_path / "x.parquet"
    generator = random.Random(0)
    texts = [generator.randbytes(15_000).hex() for _ in range(2000)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(
        table, path, row_group_size=2000, use_dictionary=False, compression="zstd"
    )
    script = f"""
import json, resource, sys
from pathlib import Path
from mhc_lightning.data.documents import ReadingLog, ReadingOptions
from mhc_lightning.data.input_files import find_input_files
from mhc_lightning.data.work_units import plan_units
import pyarrow.parquet
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
(unit,) = plan_units(find_input_files([{str(path)!r}]), 10**9, ReadingOptions())
before, size = peak(), 0
for document in unit.documents(ReadingOptions(), ReadingLog()):
    size += len(document.data)
print(json.dumps([size, peak() - before]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    size, grown = json.loads(done.stdout)
    assert size == 60_000_000
    assert grown < 30_000_000, grown


def test_without_the_library(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x", pyarrow.table({"text": TEXTS}), "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r'x is Parquet; .*`pip install "mhc-lightning\[formats\]"`'
    ):
        read(path)
