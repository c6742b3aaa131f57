"""Compressed files are read in full, or refused by name."""

import gzip
import os
from pathlib import Path

import pytest
import zstandard

from mhc_lightning.data.input_files import find_input_files
from mhc_lightning.data.text_files import TextFile, open_bytes
from mhc_lightning.errors import UserError


def as_file(path: Path) -> TextFile:
    return find_input_files([path])[0]


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


def test_long_windows_of_zstd_are_read(tmp_path: Path) -> None:
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=1)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "x.txt.zst").write_bytes(stream.compress(b"text\n" * 100) + stream.flush())
    with open_bytes(as_file(tmp_path / "x.txt.zst")) as opened:
        assert opened.read() == b"text\n" * 100
