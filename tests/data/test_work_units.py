"""Every byte of the input is in one work unit, and each document on one side of the split."""

import codecs
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mhc_lightning.data.documents import Document, ReadingLog, ReadingOptions, Skipped
from mhc_lightning.data.input_files import find_input_files
from mhc_lightning.data.text_files import TextFile
from mhc_lightning.data.work_units import FileUnit, plan_units
from mhc_lightning.errors import UserError

Write = Callable[..., Path]


def read(units: list[FileUnit], fraction: float) -> tuple[list[Document], Skipped]:
    reading, log = ReadingOptions(validation_fraction=fraction), ReadingLog()
    documents = [document for unit in units for document in unit.documents(reading, log)]
    return documents, log.skipped


def plan(files: list[TextFile], unit_bytes: int, fraction: float) -> list[FileUnit]:
    return plan_units(files, unit_bytes, ReadingOptions(validation_fraction=fraction))


def joined(documents: list[Document]) -> list[bytes]:
    """Whole documents, from the parts of long ones."""
    whole, parts = [], b""
    for document in documents:
        parts += document.data
        if document.ends:
            whole.append(parts)
            parts = b""
    assert not parts
    return whole


@pytest.mark.parametrize("unit_bytes", [50, 1000, 10**6])
def test_every_byte_of_every_file_comes_once_in_order(
    tmp_path: Path, write_texts: Write, unit_bytes: int
) -> None:
    files = find_input_files([write_texts(tmp_path / "in", 30, length=500)])
    documents, _ = read(plan(files, unit_bytes, 0.5), 0.5)
    assert joined(documents) == [Path(file.path).read_bytes() for file in files]


@pytest.mark.parametrize("unit_bytes", [1, 40, 10**6])
def test_every_line_of_jsonl_comes_once(tmp_path: Path, unit_bytes: int) -> None:
    texts = [f"text {number} é\n" * (number % 4 + 1) for number in range(50)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)  # no end of line at the end
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\n\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    units = plan(find_input_files([tmp_path]), unit_bytes, 0.1)
    documents, _ = read(units, 0.1)
    assert [document.data.decode() for document in documents] == texts * 2
    assert len(units) == {1: 52, 10**6: 1}.get(
        unit_bytes, len(units)
    )  # with one for the empty line


def test_parts_of_a_long_file_are_on_one_side(tmp_path: Path, write_texts: Write) -> None:
    files = find_input_files([write_texts(tmp_path / "in", 60, length=900)])
    documents, _ = read(plan(files, 200, 0.5), 0.5)
    sides: list[set[bool]] = [set()]
    for document in documents:
        sides[-1].add(document.held_out)
        if document.ends:
            sides.append(set())
    sides.pop()
    assert all(len(side) == 1 for side in sides)
    assert {True} in sides and {False} in sides


@pytest.mark.parametrize("compressed", [False, True])
def test_of_few_files_the_end_is_held_out(tmp_path: Path, compressed: bool) -> None:
    data = "".join(f"line {number}\n" for number in range(1000)).encode()
    path = tmp_path / ("x.txt.gz" if compressed else "x.txt")
    path.write_bytes(gzip.compress(data) if compressed else data)
    documents, _ = read(plan(find_input_files([path]), 2000, 0.1), 0.1)
    held_out = b"".join(document.data for document in documents if document.held_out)
    assert data.endswith(held_out) and held_out.startswith(b"line ")
    assert 0.08 < len(held_out) / len(data) < 0.11
    assert len(joined(documents)) == 2


@pytest.mark.parametrize("unit_bytes", [*range(1, 12), 29])
def test_text_without_line_ends_is_cut_between_characters(tmp_path: Path, unit_bytes: int) -> None:
    text = "aé🎉é🎉🎉aa日é" * 20
    path = tmp_path / "x"
    path.write_bytes(text.encode())
    documents, _ = read(plan(find_input_files([path]), unit_bytes, 0.0), 0.0)
    assert "".join(document.data.decode() for document in documents) == text
    assert all(len(document.data) <= unit_bytes + 3 for document in documents)


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n{"text": "x"}\n')
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf")
    documents, skipped = read(plan(find_input_files([tmp_path]), 100, 0.2), 0.2)
    assert [document.data for document in documents] == [b"x"]
    assert skipped.empty_documents == 3


@pytest.mark.parametrize("unit_bytes", [100, 10**6])
@pytest.mark.parametrize("fraction", [0.0, 0.3])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_mark_at_the_beginning_of_a_text_is_no_part_of_it(
    tmp_path: Path, unit_bytes: int, fraction: float, compressed: bool
) -> None:
    text = "".join(f"\ufeffline {number}\n" for number in range(100)).encode()
    for number in range(20):
        data = codecs.BOM_UTF8 + b"%d\n" % number + text
        path = tmp_path / f"{number}.txt{'.gz' if compressed else ''}"
        path.write_bytes(gzip.compress(data) if compressed else data)
    files = find_input_files([tmp_path])
    assert {file.format for file in files} == {"plain text without its byte-order mark"}
    documents, _ = read(plan(files, unit_bytes, fraction), fraction)
    numbers = sorted(map(str, range(20)))
    assert b"".join(document.data for document in documents) == b"".join(
        number.split(".")[0].encode() + b"\n" + text for number in sorted(f"{n}.t" for n in numbers)
    )


@pytest.mark.parametrize("position", [0, 100, 70_000, 200_000])
@pytest.mark.parametrize("unit_bytes", [50_000, 10**6])
def test_a_nul_is_a_byte_of_text_wherever_it_is(
    tmp_path: Path, position: int, unit_bytes: int
) -> None:
    data = bytearray(b"some text of a log\n" * 12_000)
    data[position] = 0
    (tmp_path / "x.log").write_bytes(data)
    documents, _ = read(plan(find_input_files([tmp_path]), unit_bytes, 0.0), 0.0)
    assert joined(documents) == [data]


@pytest.mark.parametrize("bad", [b"{", b'{"body": "a"}', b'{"text": 5}'])
@pytest.mark.parametrize("unit_bytes", [40, 10**6])
def test_a_bad_line_is_named_wherever_it_is(tmp_path: Path, unit_bytes: int, bad: bytes) -> None:
    lines = [b'{"text": "number %d"}' % number for number in range(1, 101)]
    lines[76] = bad
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    units = plan(find_input_files([tmp_path]), unit_bytes, 0.0)
    with pytest.raises(UserError, match=r"line 77 of .*a\.jsonl"):
        read(units, 0.0)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_a_file_that_changed_since_it_was_found_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = b'{"text": "a"}\n'
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for change in (path.read_bytes() * 2, path.read_bytes()):  # longer; the same length
        units = plan(find_input_files([path]), 10**6, 0.0)
        path.write_bytes(change)
        os.utime(path, ns=(0, len(change)))
        with pytest.raises(UserError, match=f"{name} changed while it was read"):
            read(units, 0.0)
