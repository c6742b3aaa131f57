"""Compressed streams are read to their end, in pieces, and not beyond a size."""

import bz2
import gzip
import io
import lzma
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from mhc_lightning.data.formats import streams
from mhc_lightning.data.formats.compression import (
    compression_of,
    decompressed,
    ending_of,
    stem_of,
)
from mhc_lightning.errors import UserError

Compress = Callable[[bytes], bytes]
COMPRESS: dict[str, Compress] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def unpack(data: bytes, kind: str, max_expansion: float = 10**9) -> bytes:
    stream = decompressed(io.BytesIO(data), kind, "a name", len(data), max_expansion)
    return stream.read()


@pytest.mark.parametrize("kind", COMPRESS)
def test_frames_follow_each_other(kind: str) -> None:
    compress = COMPRESS[kind]
    parts = [random.Random(size).randbytes(size) * 3 for size in (0, 1, 70_000, 200_000, 3)]
    assert unpack(b"".join(map(compress, parts)), kind) == b"".join(parts)
    assert unpack(b"", kind) == b""


def test_xz_may_be_padded() -> None:
    data = lzma.compress(b"one") + bytes(8) + lzma.compress(b"two") + bytes(4)
    assert unpack(data, ".xz") == b"onetwo"


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "first", "noise", "after"])
def test_damage_is_found_wherever_it_is(
    tmp_path: Path, read: Callable[..., object], kind: str, damage: str
) -> None:
    noise = os.urandom(100_000).hex().encode()
    data = COMPRESS[kind](noise)
    damaged = {
        "cut": data[:-1],
        "first": data[:20],
        "noise": data[:40_000] + b"noise" + data[40_005:],
        "after": data + b"something that is no frame",
    }[damage]
    path = tmp_path / f"x.txt{kind}"
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"input .*/x\.txt\{kind} is damaged: .*leave it out$"):
        read(path)


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_bomb_is_refused_before_it_fills_the_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read: Callable[..., object], kind: str
) -> None:
    bomb = COMPRESS[kind](bytes(60 << 20).replace(b"\0", b" "))
    path = tmp_path / f"bomb.txt{kind}"
    path.write_bytes(bomb)
    monkeypatch.setattr(streams, "_SMALL", 1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"more than 20 times its size.*max_expansion=…"):
            read(path, max_expansion=20.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20, peak  # of which 8 MiB are the window of xz
    assert len(unpack(bomb, kind)) == 60 << 20


def test_names_and_first_bytes_tell_the_compression() -> None:
    cases = {
        "a.txt.gz": (".gz", "a.txt", ".txt.gz"),
        "b/A.TGZ": (".gz", "b/A.tar", ".TGZ"),
        "a.tar.xz": (".xz", "a.tar", ".tar.xz"),
        "a.tbz2": (".bz2", "a.tar", ".tbz2"),
        "a": ("", "a", ""),
        "a.txt": ("", "a.txt", ".txt"),
    }
    for name, (kind, stem, ending) in cases.items():
        assert (compression_of(name), stem_of(name), ending_of(name)) == (kind, stem, ending)
    for kind, compress in COMPRESS.items():
        assert compression_of("a.bin", compress(b"x")) == kind
    assert compression_of("a.txt", b"BZh is no compression") == ""
