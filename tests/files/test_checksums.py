"""Checksums are those of the standard tools, and an unchanged file is read once."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash

from mhc_lightning.files import checksums
from mhc_lightning.files.checksums import file_sha256, file_xxh3, has_checksum, json_sha256

CONTENT = os.urandom(1000) * 700  # more than two blocks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


def test_checksums_are_those_of_the_standard_tools(path: Path) -> None:
    assert file_sha256(path) == hashlib.sha256(CONTENT).hexdigest()
    assert file_xxh3(path) == xxhash.xxh3_128_hexdigest(CONTENT)


def test_a_json_checksum_depends_on_the_content_alone() -> None:
    assert json_sha256({"a": 1, "b": [2]}) == json_sha256({"b": [2], "a": 1})
    assert json_sha256({"a": 1}) != json_sha256({"a": 2})


@pytest.mark.parametrize("fast", [True, False])
def test_an_unchanged_file_is_read_once(
    path: Path, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    original = checksums._digest

    def counted(algorithm: Any, descriptor: int) -> str:
        reads.append(descriptor)
        return original(algorithm, descriptor)

    monkeypatch.setattr(checksums, "_digest", counted)
    expected = (file_xxh3(path) if fast else "", file_sha256(path))
    with path.open("r+b", buffering=0) as file:
        file.seek(5)
        for _ in range(2):
            assert has_checksum(file.fileno(), path, *expected)
        assert len(reads) == 1 and file.tell() == 5, "forked processes share the position"
        file.seek(-1, os.SEEK_END)
        file.write(bytes([CONTENT[-1] ^ 1]))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
        assert not has_checksum(file.fileno(), path, *expected)
        assert not has_checksum(file.fileno(), path, *expected), "a wrong file is not remembered"
    assert len(reads) == 3
