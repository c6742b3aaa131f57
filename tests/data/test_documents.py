import gzip
import os
from pathlib import Path

import pytest
import zstandard

from mhc_lightning.data.documents import (
    TextFile,
    find_text_files,
    jsonl_document,
    looks_binary,
    open_bytes,
    text_bytes,
)
from mhc_lightning.errors import UserError


def as_file(path: Path) -> TextFile:
    return find_text_files([path])[0]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b/x.py", "a.txt", "b/c/y.md", ".git/config", "b/__pycache__/z.py", "b/.hidden"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "tree"


def names(files: list[TextFile]) -> list[str]:
    return [file.name for file in files]


def test_folders_are_read_recursively_in_a_fixed_order(tree: Path) -> None:
    assert names(find_text_files([tree])) == ["a.txt", "b/c/y.md", "b/x.py"]


def test_patterns_choose_files(tree: Path) -> None:
    assert names(find_text_files([tree], include=["*.py", "*.txt"])) == ["a.txt", "b/x.py"]
    assert names(find_text_files([tree], include=["b/*"])) == ["b/c/y.md", "b/x.py"]
    assert names(find_text_files([tree], exclude=["c"])) == ["a.txt", "b/x.py"]
    assert names(find_text_files([tree], exclude=["b/*.md", "a.*"])) == ["b/x.py"]
    assert names(find_text_files([tree], not_below=[tree / "b"])) == ["a.txt"]


def test_a_named_file_is_taken_though_hidden(tree: Path) -> None:
    assert names(find_text_files([tree / "b/.hidden", tree / "a.txt"])) == [".hidden", "a.txt"]


def test_missing_and_unreadable_inputs_are_named(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"absent does not exist"):
        find_text_files([tmp_path / "absent"])

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        find_text_files([tmp_path])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_files_are_read_in_full(tmp_path: Path, suffix: str) -> None:
    data = os.urandom(300_000).hex().encode()
    compress = {
        "": lambda data: data,
        ".gz": lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:]),
        ".zst": lambda data: (
            zstandard.compress(data[:1000]) + zstandard.ZstdCompressor().compress(data[1000:])
        ),
    }[suffix]
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(compress(data))
    file = as_file(path)
    assert file.is_jsonl and file.compression == suffix
    with open_bytes(file) as stream:
        assert not looks_binary(stream)
        assert stream.read() == data


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_compressed_files_are_named(tmp_path: Path, suffix: str, damage: str) -> None:
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    data = compress(os.urandom(100_000))
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(data[:60_000] if damage == "cut" else data[:5] + os.urandom(50_000))
    with (
        pytest.raises(UserError, match=rf"x\.txt\{suffix} is damaged"),
        open_bytes(as_file(path)) as stream,
    ):
        stream.read()


def test_nul_bytes_mark_binary_files(tmp_path: Path) -> None:
    (tmp_path / "a.so").write_bytes(b"ELF\0\0abc")
    with open_bytes(as_file(tmp_path / "a.so")) as stream:
        assert looks_binary(stream)
        assert stream.read(3) == b"ELF"


def test_jsonl_lines_give_their_field() -> None:
    file = TextFile("/x.jsonl", "x.jsonl", 0, 0)
    assert jsonl_document('{"text": "hé\\n"}'.encode(), "text", file, 1) == "hé\n".encode()
    assert jsonl_document(b'{"text": null}', "text", file, 1) == b""
    assert jsonl_document(b'{"text": "\xff"}', "text", file, 1) == b"\xff"
    for line, message in (
        (b"{", r"line 7 of /x\.jsonl is no JSON"),
        (b'{"body": "a", "id": 1}', r"line 7 .* no field 'text' but 'body', 'id'"),
        (b'["a"]', "no field 'text' but no fields at all"),
        (b'{"text": 5}', "is int, not text"),
    ):
        with pytest.raises(UserError, match=message):
            jsonl_document(line, "text", file, 7)


def test_lone_surrogates_are_kept_as_bytes() -> None:
    assert text_bytes("a\udcffb") == b"a\xffb"
    assert text_bytes("a\ud800") == b"a\xed\xa0\x80"
