"""Put finished units together: one litdata dataset per split, the tokenizer, and the record."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.chunk_file import Chunk
from mhc_lightning.data.file_formats import BINARY
from mhc_lightning.data.prepared_record import (
    RECORD_FILE,
    SPLITS,
    TRAIN,
    VALIDATION,
    Record,
    content_checksum,
)
from mhc_lightning.data.tokenizer_files import TOKENIZER_FILE
from mhc_lightning.data.tokenizers import JsonTokenizer, Tokenizer
from mhc_lightning.data.unit_tokenization import (
    Counts,
    ShardOptions,
    held_out_tokens,
    read_shard,
    unit_folder,
    write_chunks,
)
from mhc_lightning.data.work_units import Skipped
from mhc_lightning.errors import UserError
from mhc_lightning.files.checksums import file_xxh3

INDEX_FILE = "index.json"


def assemble(
    work: Path,
    num_units: int,
    tokenizer: Tokenizer,
    options: ShardOptions,
    identity: str,
    settings: dict[str, Any],
    inputs: str,
    forms: dict[str, dict[str, int]],
) -> Record:
    """Build ``work/final`` from the units below ``work/units``.

    Args:
        work: The folder of this run.
        num_units: Number of units, all finished.
        tokenizer: The tokenizer; a ``tokenizer.json`` is copied.
        options: As the units were written with.
        identity: See :class:`mhc_lightning.data.prepared_record.Record`.
        settings: Likewise.
        inputs: The inputs' names, for the error message.
        forms: See :class:`mhc_lightning.data.prepared_record.Record`.

    Returns:
        The record, which is also written.

    Raises:
        UserError: There is no text to train on.
    """
    final = work / "final"
    shutil.rmtree(final, ignore_errors=True)
    (final / TRAIN).mkdir(parents=True)
    counts = {split: Counts() for split in SPLITS}
    skipped = Skipped(binary_files=sum(forms.get(BINARY, {}).values()))
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    configs: dict[str, dict[str, Any]] = {}
    folders = [unit_folder(work / "units", unit) for unit in range(num_units)]
    for unit, folder in enumerate(folders):
        shard = read_shard(folder)
        counts[TRAIN].add(shard.train)
        counts[VALIDATION].add(shard.validation)
        skipped.empty_documents += shard.skipped.empty_documents
        for number, entry in enumerate(shard.chunks):
            name = f"chunk-{unit:06d}-{number:03d}.bin"
            _link(folder / entry["filename"], final / TRAIN / name)
            entries[TRAIN].append({**entry, "filename": name})
            configs[TRAIN] = shard.config
    _check_not_empty(counts, skipped, inputs)

    def held_out() -> Iterator[np.ndarray]:
        for folder in folders:
            tokens = held_out_tokens(folder)
            if tokens is not None:
                yield tokens

    if counts[VALIDATION].tokens:
        (final / VALIDATION).mkdir()
        entries[VALIDATION], configs[VALIDATION] = write_chunks(
            held_out(), final / VALIDATION, options.chunk_bytes
        )
    files = {}
    for split, config in configs.items():
        ours = ("sha256", "xxh3")
        plain = [{k: v for k, v in entry.items() if k not in ours} for entry in entries[split]]
        index = {"chunks": plain, "config": config}
        (final / split / INDEX_FILE).write_text(json.dumps(index, sort_keys=True))
        files[f"{split}/{INDEX_FILE}"] = file_xxh3(final / split / INDEX_FILE)
    if isinstance(tokenizer, JsonTokenizer):
        shutil.copyfile(tokenizer.path, final / TOKENIZER_FILE)
    chunks = {split: [_chunk(split, entry) for entry in entries[split]] for split in SPLITS}
    record = Record(
        identity=identity,
        content=content_checksum(chunks, tokenizer.fingerprint),
        tokenizer=tokenizer.record(),
        dtype=tokenizer.dtype.name,
        counts=counts,
        skipped=skipped,
        chunks=chunks,
        settings=settings,
        forms=forms,
        files=files,
    )
    (final / RECORD_FILE).write_text(record.to_json())
    return record


def _check_not_empty(counts: dict[str, Counts], skipped: Skipped, inputs: str) -> None:
    if counts[TRAIN].tokens:
        return
    if counts[VALIDATION].tokens:
        raise UserError(
            f"every document of {inputs} fell into the validation split;"
            " give more documents or a smaller validation_fraction"
        )
    raise UserError(
        f"no text in {inputs}: {skipped.binary_files} binary files and"
        f" {skipped.empty_documents} empty documents were skipped"
    )


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _chunk(split: str, entry: dict[str, Any]) -> Chunk:
    header = 4 * (2 + entry["chunk_size"])  # uint32: number of items, then their n + 1 offsets
    name = f"{split}/{entry['filename']}"
    return Chunk(name, entry["dim"], header, entry["chunk_bytes"], entry["sha256"], entry["xxh3"])
