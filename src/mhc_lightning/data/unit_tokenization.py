"""Turn one unit of input into litdata token chunks, in a folder of its own.

The folder appears under its final name only when everything in it is written, so its presence
means that the unit is done.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.tokenizers import Tokenizer
from mhc_lightning.data.work_units import Document, Skipped, Unit
from mhc_lightning.files.checksums import file_sha256, file_xxh3, json_sha256

# litdata asks a package index for its newest version when it is imported, unless told not to.
os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

_SUMMARY_FILE = "unit.json"
_HELD_OUT_FILE = "validation.npy"
_BATCH_BYTES = 1 << 20
_SLICES_PER_CHUNK = 16


@dataclass
class Counts:
    """What a split, or all of a prepared folder, holds.

    Attributes:
        documents: Documents; a file of which the end is held out counts in both splits.
        tokens: Tokens, the end of each document included.
        bytes: Bytes of text.
        invalid_utf8: Documents (or parts of very long ones) with bytes that are no UTF-8.
        with_nul: Documents (or parts) with NUL bytes.
        unknown: Tokens that stand for text which the tokenizer does not know.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    invalid_utf8: int = 0
    with_nul: int = 0
    unknown: int = 0

    def add(self, other: "Counts") -> None:
        """Add the numbers of another one to this one's."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.invalid_utf8 += other.invalid_utf8
        self.with_nul += other.with_nul
        self.unknown += other.unknown


@dataclass
class ShardSummary:
    """What became of one unit.

    Attributes:
        train: Counts of the training split.
        validation: Counts of the validation split.
        skipped: What was left out.
        chunks: litdata's entries for the training chunks, each with its checksums.
        config: litdata's configuration of these chunks; empty if there are none.
        held_out: Checksum of the file of held-out tokens; empty if there are none.
    """

    train: Counts
    validation: Counts
    skipped: Skipped
    chunks: list[dict[str, Any]]
    config: dict[str, Any]
    held_out: str = ""


@dataclass(frozen=True)
class ShardOptions:
    """How units become chunks; equal for all units of one run.

    Attributes:
        text_field: Key of the text in JSONL lines and dataset rows.
        validation_fraction: Share of the documents that is held out.
        chunk_bytes: Largest size of a chunk file.
    """

    text_field: str
    validation_fraction: float
    chunk_bytes: int


def unit_folder(folder: Path, unit: int) -> Path:
    """Where a unit's chunks and summary are."""
    return folder / f"{unit:06d}"


def write_shard(unit: Unit, folder: Path, tokenizer: Tokenizer, options: ShardOptions) -> None:
    """Write a unit's training chunks and held-out tokens below ``folder``, which appears whole."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    train, validation, skipped = Counts(), Counts(), Skipped()
    held_out: list[np.ndarray] = []

    def training_tokens() -> Iterator[np.ndarray]:
        documents = unit.documents(options.text_field, options.validation_fraction, skipped)
        for batch in _batches(documents):
            kept = [document for document in batch if not document.held_out]
            held = [document for document in batch if document.held_out]
            if held:
                held_out.append(_encode(held, tokenizer, validation))
            if kept:
                yield _encode(kept, tokenizer, train)

    chunks, config = write_chunks(training_tokens(), temporary, options.chunk_bytes)
    if held_out:
        np.save(temporary / _HELD_OUT_FILE, np.concatenate(held_out))
    checksum = file_xxh3(temporary / _HELD_OUT_FILE) if held_out else ""
    summary = ShardSummary(train, validation, skipped, chunks, config, checksum)
    content = asdict(summary)
    sealed = {**content, "checksum": json_sha256(content)}
    (temporary / _SUMMARY_FILE).write_text(json.dumps(sealed))
    temporary.rename(folder)


def read_shard(folder: Path) -> ShardSummary:
    """The summary of a finished unit.

    Raises:
        OSError, ValueError, KeyError, TypeError: There is none, or it was changed.
    """
    content = json.loads((folder / _SUMMARY_FILE).read_text())
    if content.pop("checksum") != json_sha256(content):
        raise ValueError(f"{folder / _SUMMARY_FILE} is damaged")
    return ShardSummary(
        Counts(**content["train"]),
        Counts(**content["validation"]),
        Skipped(**content["skipped"]),
        content["chunks"],
        content["config"],
        content["held_out"],
    )


def is_finished(folder: Path) -> bool:
    """Whether a unit is done and what it wrote is there still, as it was."""
    try:
        shard = read_shard(folder)
        checksums = {chunk["filename"]: chunk["xxh3"] for chunk in shard.chunks}
        if shard.held_out:
            checksums[_HELD_OUT_FILE] = shard.held_out
        return all(file_xxh3(folder / name) == expected for name, expected in checksums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def held_out_tokens(folder: Path) -> np.ndarray | None:
    """The held-out tokens of a finished unit, or None."""
    path = folder / _HELD_OUT_FILE
    return np.load(path) if path.exists() else None


def write_chunks(
    tokens: Iterable[np.ndarray], folder: Path, chunk_bytes: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Write arrays of tokens as litdata chunks.

    Args:
        tokens: One-dimensional arrays of one dtype.
        folder: Where the chunk files go.
        chunk_bytes: Largest size of a chunk file.

    Returns:
        litdata's entries for the chunks, each with its checksums, and its configuration.
    """
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=chunk_bytes, item_loader=TokensLoader())
    for index, array in enumerate(_slices(tokens, chunk_bytes)):
        writer[index] = array
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
    """Cut long arrays, because litdata never divides one between chunks."""
    for array in arrays:
        length = max(1, chunk_bytes // _SLICES_PER_CHUNK // array.itemsize)
        for start in range(0, len(array), length):
            yield array[start : start + length]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents, so that short ones do not pay for a call each."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(documents: list[Document], tokenizer: Tokenizer, counts: Counts) -> np.ndarray:
    """Tokens of the documents one after the other, each followed by the end of document."""
    end = np.array([tokenizer.end_of_document], dtype=tokenizer.dtype)
    parts: list[np.ndarray] = []
    encoded = tokenizer.encode_documents([document.data for document in documents])
    for document, tokens in zip(documents, encoded, strict=True):
        parts += [tokens, end] if document.ends else [tokens]
        counts.documents += document.ends
        counts.bytes += len(document.data)
        counts.invalid_utf8 += not _is_utf8(document.data)
        counts.with_nul += b"\0" in document.data
        if tokenizer.unknown is not None:
            counts.unknown += int(np.count_nonzero(tokens == tokenizer.unknown))
    tokens = np.concatenate(parts)
    counts.tokens += len(tokens)
    return tokens


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
