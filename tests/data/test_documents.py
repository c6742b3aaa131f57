import gzip
import os
from pathlib import Path

import pytest
import zstandard

from mhc_lightning.data.documents import (
    TextFile,
    jsonl_document,
    open_bytes,
    text_bytes,
)
from mhc_lightning.data.input_files import find_text_files
from mhc_lightning.errors import UserError


def as_file(path: Path) -> TextFile:
    return find_text_files([path])[0]


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


def test_jsonl_lines_give_their_field() -> None:
    assert jsonl_document('{"text": "hé\\n"}'.encode(), "text", str) == "hé\n".encode()
    assert jsonl_document(b'{"text": null}', "text", str) == b""
    assert jsonl_document(b'{"text": "\xff"}', "text", str) == b"\xff"
    for line, message in (
        (b"{", r"line 7 of /x\.jsonl is no JSON"),
        (b'{"body": "a", "id": 1}', r"line 7 .* no field 'text' but 'body', 'id'"),
        (b'["a"]', "no field 'text' but no fields at all"),
        (b'{"text": 5}', "is int, not text"),
        (b'{"text": "a", "deep": ' + b"[" * 10**5, "line 7 of /x.jsonl is no JSON"),
    ):
        with pytest.raises(UserError, match=message):
            jsonl_document(line, "text", lambda: "line 7 of /x.jsonl")


def test_lone_surrogates_are_kept_as_bytes() -> None:
    assert text_bytes("a\udcffb") == b"a\xffb"
    assert text_bytes("a\ud800") == b"a\xed\xa0\x80"
    assert text_bytes("é\ud800 \udcff\udcfe") == "é".encode() + b"\xed\xa0\x80 \xff\xfe"


def test_long_windows_of_zstd_are_read(tmp_path: Path) -> None:
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=1)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "x.txt.zst").write_bytes(stream.compress(b"text\n" * 100) + stream.flush())
    with open_bytes(as_file(tmp_path / "x.txt.zst")) as opened:
        assert opened.read() == b"text\n" * 100
