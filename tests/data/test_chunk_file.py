"""A chunk file gives its tokens, or an error that names it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhc_lightning.data.chunk_file import Chunk, ChunkFile
from mhc_lightning.errors import UserError
from mhc_lightning.files import checksums
from mhc_lightning.files.checksums import file_sha256, file_xxh3

TOKENS = np.arange(200_000, dtype=np.uint16)
HEADER = b"head"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "chunk.bin"
    file.write_bytes(HEADER + TOKENS.tobytes())
    return file


@pytest.fixture(params=[True, False], ids=["xxh3", "sha256 alone"])
def chunk(path: Path, request: pytest.FixtureRequest) -> Chunk:
    fast = file_xxh3(path) if request.param else ""
    size = path.stat().st_size
    return Chunk("train/chunk.bin", len(TOKENS), len(HEADER), size, file_sha256(path), fast)


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often a whole file was read."""
    calls: list[int] = []
    original = checksums._digest

    def counted(algorithm: Any, descriptor: int) -> str:
        calls.append(descriptor)
        return original(algorithm, descriptor)

    monkeypatch.setattr(checksums, "_digest", counted)
    return calls


def opened(path: Path, chunk: Chunk) -> ChunkFile:
    return ChunkFile(path, chunk, TOKENS.dtype, str(path), "fix it")


def change(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    with path.open("r+b") as stream:  # the same file, as a program that writes into it has it
        stream.write(data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def test_reads_are_the_tokens(path: Path, chunk: Chunk) -> None:
    file = opened(path, chunk)
    for start, count in (
        (0, 5),
        (7, 100),
        (199_990, 10),
        (199_990, 99),
        (200_000, 3),
        (0, 200_000),
    ):
        assert np.array_equal(file.read(start, count), TOKENS[start : start + count])
    file.close()
    file.close()


def test_reads_go_on_where_one_call_gives_less(
    path: Path, chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, pread = opened(path, chunk), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 99_999), at))
    assert np.array_equal(file.read(1, 200_000), TOKENS[1:])
    assert np.array_equal(opened(path, chunk).read(0, 60_000), TOKENS[:60_000])


@pytest.mark.parametrize("position", [0, 4, 150_001, 400_003])
def test_a_changed_byte_anywhere_is_found(path: Path, chunk: Chunk, position: int) -> None:
    change(path, position)
    with pytest.raises(UserError, match=r"chunk\.bin is damaged \(checksum\); fix it"):
        opened(path, chunk)


def test_a_file_is_read_once_and_again_when_it_changed(
    path: Path, chunk: Chunk, digests: list[int]
) -> None:
    first = opened(path, chunk)
    for _ in range(3):
        again = opened(path, chunk)
        again.check_again()
    assert len(digests) == 1
    os.utime(path, ns=(0, 10**18))  # touched, not changed
    first.check_again()
    again.check_again()
    first.check_again()
    assert len(digests) == 2
    change(path, 9)
    for file in (first, again):
        with pytest.raises(UserError, match="is damaged"):
            file.check_again()


def test_a_file_cut_short_while_it_is_open_is_named(path: Path, chunk: Chunk) -> None:
    file = opened(path, chunk)
    os.truncate(path, 100)
    with pytest.raises(UserError, match="was cut short; fix it"):
        file.read(150_000, 9)
    with pytest.raises(UserError, match=r"has 100 bytes, not 400004; fix it"):
        file.check_again()


def test_a_file_replaced_or_deleted_while_it_is_open_stays_readable(
    path: Path, chunk: Chunk, tmp_path: Path
) -> None:
    file = opened(path, chunk)
    (tmp_path / "new").write_bytes(b"something else")
    (tmp_path / "new").replace(path)
    file.check_again()
    assert np.array_equal(file.read(3, 9), TOKENS[3:12])
    path.unlink()
    assert np.array_equal(file.read(3, 9), TOKENS[3:12])


def test_what_is_no_readable_file_is_named(
    path: Path, chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    file = opened(path, chunk)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", refuse)
        with pytest.raises(UserError, match="cannot be read: Permission denied; fix it"):
            file.read(0, 9)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(UserError, match="cannot be read: Permission denied; fix it"):
            opened(path, chunk)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        opened(path, chunk)
    path.symlink_to("absent")
    with pytest.raises(FileNotFoundError):
        opened(path, chunk)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="fix it"):
        opened(path, chunk)
