"""Finished work units put together: a litdata dataset per split, the tokenizer, and the record."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.chunk_file import Chunk
from mhc_lightning.data.chunk_writing import write_chunks
from mhc_lightning.data.conversation_tokenizer import ConversationTokenizer
from mhc_lightning.data.documents import Skipped
from mhc_lightning.data.file_formats import BINARY
from mhc_lightning.data.input_files import count_formats
from mhc_lightning.data.prepared_record import (
    ALL,
    ANSWERS,
    LISTING_FILE,
    RECORD_FILE,
    SPLITS,
    TRAIN,
    VALIDATION,
    PreparedRecord,
    TextCounts,
    content_checksum,
)
from mhc_lightning.data.tokenizer_files import TOKENIZER_FILE, companions_of
from mhc_lightning.data.tokenizers import JsonTokenizer, Tokenizer
from mhc_lightning.data.unit_tokenization import read_held_out, read_result, unit_folder
from mhc_lightning.errors import UserError
from mhc_lightning.files.checksums import file_xxh3

_INDEX_FILE = "index.json"
_OWN_KEYS = ("sha256", "xxh3")  # of a chunk's entry; litdata knows the others


def write_prepared(
    work: Path,
    num_units: int,
    tokenizer: Tokenizer,
    chunk_bytes: int,
    identity: str,
    settings: dict[str, Any],
    inputs: str,
    found: Sequence[tuple[str, str]],
) -> PreparedRecord:
    """Write `work/final` from the units below `work/units`.

    Args:
        work: The folder of this run.
        num_units: Number of units, all finished.
        tokenizer: The tokenizer; a `tokenizer.json` is copied, with what belongs to it.
        chunk_bytes: Largest size of a chunk file.
        identity: See `PreparedRecord`.
        settings: See `PreparedRecord`.
        inputs: Names of the inputs, for the error message.
        found: Names of the input files, and what each was taken for.

    Returns:
        The record, which is also written.

    Raises:
        UserError: There is no text to train on.
    """
    final = work / "final"
    shutil.rmtree(final, ignore_errors=True)
    (final / TRAIN).mkdir(parents=True)
    counts = {split: TextCounts() for split in SPLITS}
    skipped = Skipped(binary_files=sum(description == BINARY for _, description in found))
    files_taken = list(found)
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    configs: dict[str, dict[str, Any]] = {}
    folders = [unit_folder(work / "units", unit) for unit in range(num_units)]
    for unit, folder in enumerate(folders):
        result = read_result(folder)
        counts[TRAIN].add(result.train)
        counts[VALIDATION].add(result.validation)
        skipped.add(result.skipped)
        files_taken += result.members
        for number, entry in enumerate(result.chunks):
            name = f"chunk-{unit:06d}-{number:03d}.bin"
            _link(folder / entry["filename"], final / TRAIN / name)
            entries[TRAIN].append({**entry, "filename": name})
            configs[TRAIN] = result.config
    _check_not_empty(counts, skipped, inputs)
    if counts[VALIDATION].tokens:
        (final / VALIDATION).mkdir()
        entries[VALIDATION], configs[VALIDATION] = write_chunks(
            _held_out_tokens(folders), final / VALIDATION, chunk_bytes
        )
    files = {LISTING_FILE: _write_listing(final / LISTING_FILE, files_taken)}
    for split, config in configs.items():
        chunks = [
            {k: v for k, v in entry.items() if k not in _OWN_KEYS} for entry in entries[split]
        ]
        index = final / split / _INDEX_FILE
        index.write_text(json.dumps({"chunks": chunks, "config": config}, sort_keys=True))
        files[f"{split}/{_INDEX_FILE}"] = file_xxh3(index)
    texts = tokenizer.texts if isinstance(tokenizer, ConversationTokenizer) else tokenizer
    if isinstance(texts, JsonTokenizer):
        shutil.copyfile(texts.path, final / TOKENIZER_FILE)
        for file in companions_of(texts.path):
            shutil.copyfile(file, final / file.name)
            files[file.name] = file_xxh3(final / file.name)
    chunks_of = {split: [_chunk(split, entry) for entry in entries[split]] for split in SPLITS}
    record = PreparedRecord(
        identity=identity,
        content=content_checksum(chunks_of, tokenizer.fingerprint),
        tokenizer=tokenizer.record(),
        dtype=tokenizer.dtype.name,
        counts=counts,
        skipped=skipped,
        chunks=chunks_of,
        settings=settings,
        forms=count_formats(files_taken),
        files=files,
        targets=ALL if texts is tokenizer else ANSWERS,
    )
    (final / RECORD_FILE).write_text(record.to_json())
    return record


def _check_not_empty(counts: dict[str, TextCounts], skipped: Skipped, inputs: str) -> None:
    if counts[TRAIN].tokens:
        return
    if counts[VALIDATION].tokens:
        raise UserError(
            f"every document of {inputs} fell into the validation split;"
            " give more documents or a smaller validation_fraction"
        )
    raise UserError(
        f"no text in {inputs}: {skipped.binary_files} binary files, {skipped.empty_documents} empty"
        f" documents, {skipped.bad_records} bad records and {skipped.other_web_records} web records"
        " that are not plain text were skipped"
    )


def _write_listing(path: Path, files: Sequence[tuple[str, str]]) -> str:
    """Write which file was taken for what, a line of JSON for each; returns the checksum."""
    with path.open("w", encoding="utf-8") as listing:
        for name, description in files:
            print(json.dumps({"file": name, "taken_for": description}), file=listing)
    return file_xxh3(path)


def _held_out_tokens(folders: list[Path]) -> Iterator[np.ndarray]:
    for folder in folders:
        tokens = read_held_out(folder)
        if tokens is not None:
            yield tokens


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _chunk(split: str, entry: dict[str, Any]) -> Chunk:
    header = 4 * (2 + entry["chunk_size"])  # uint32: the number n of items, then n + 1 offsets
    name = f"{split}/{entry['filename']}"
    return Chunk(name, entry["dim"], header, entry["chunk_bytes"], entry["sha256"], entry["xxh3"])
