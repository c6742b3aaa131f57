"""Arrays of tokens written as litdata chunk files, with checksums of each."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.files.checksums import file_sha256, file_xxh3

# litdata asks a package index for its newest version when it is imported, unless this is set.
os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

_SLICES_PER_CHUNK = 16


def write_chunks(
    arrays: Iterable[np.ndarray], folder: Path, chunk_bytes: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Write arrays of tokens as litdata chunks.

    Args:
        arrays: One-dimensional arrays of one dtype.
        folder: Folder for the chunk files.
        chunk_bytes: Largest size of a chunk file.

    Returns:
        litdata's entries for the chunks, each with its checksums, and litdata's configuration; both
        empty if there are no tokens.
    """
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=chunk_bytes, item_loader=TokensLoader())
    for number, array in enumerate(_slices(arrays, chunk_bytes)):
        writer[number] = array
    writer.done()
    index_file = folder / f"{writer.rank}.index.json"
    if not index_file.exists():
        return [], {}
    index = json.loads(index_file.read_text())
    index_file.unlink()
    for chunk in index["chunks"]:
        chunk["sha256"] = file_sha256(folder / chunk["filename"])
        chunk["xxh3"] = file_xxh3(folder / chunk["filename"])
    return index["chunks"], index["config"]


def _slices(arrays: Iterable[np.ndarray], chunk_bytes: int) -> Iterator[np.ndarray]:
    """Cut long arrays, because litdata never divides an array between chunks."""
    for array in arrays:
        length = max(1, chunk_bytes // _SLICES_PER_CHUNK // array.itemsize)
        for start in range(0, len(array), length):
            yield array[start : start + length]
