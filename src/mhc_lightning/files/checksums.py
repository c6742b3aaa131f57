"""Checksums of files and JSON: SHA-256, and the faster XXH3 for files read in training."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 18

# State of each file whose checksum this process (or the parent, before a fork) verified, by path
# and checksum. A chunk that is opened again is read again only if its state changed.
_verified: dict[tuple[str, str], tuple[int, ...]] = {}


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_xxh3(path: Path) -> str:
    """Hexadecimal XXH3 (128 bits) of a file: detects accidents, ten times as fast as SHA-256."""
    import xxhash

    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def json_sha256(content: dict[str, Any]) -> str:
    """SHA-256 of the content of a JSON object, independent of key order and white space."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def has_checksum(descriptor: int, path: Path, xxh3: str, sha256: str) -> bool:
    """True if an open file has a checksum; an unchanged file is read once per process.

    Args:
        descriptor: The open file.
        path: Path of the file, by which the result is remembered.
        xxh3: The expected `file_xxh3`; empty to compare with `sha256`.
        sha256: The expected `file_sha256`.

    Raises:
        OSError: The file cannot be read.
    """
    import xxhash

    key = (str(path), xxh3 or sha256)
    before = _state(descriptor)
    if _verified.get(key) == before:
        return True
    digest = _digest(xxhash.xxh3_128() if xxh3 else hashlib.sha256(), descriptor)
    if digest != (xxh3 or sha256):
        return False
    _verified[key] = before  # a change during the read gives another state
    return True


def _state(descriptor: int) -> tuple[int, ...]:
    """Device, inode, size and modification time of an open file, which change with its content."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _digest(algorithm: Any, descriptor: int) -> str:
    """Digest of an open file; keeps its position, which forked processes share."""
    position = 0
    while block := os.pread(descriptor, _BLOCK_BYTES, position):
        algorithm.update(block)
        position += len(block)
    digest: str = algorithm.hexdigest()
    return digest
