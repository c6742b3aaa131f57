"""One work unit tokenized into litdata chunks, in a folder of its own.

The folder takes its final name when all files in it are written. So its presence means that the
unit is finished.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.chunk_writing import write_chunks
from mhc_lightning.data.documents import Document, ReadingLog, ReadingOptions, Skipped
from mhc_lightning.data.prepared_record import TextCounts
from mhc_lightning.data.text_cuts import TextCuts
from mhc_lightning.data.tokenizers import Tokenizer
from mhc_lightning.data.work_units import WorkUnit
from mhc_lightning.files.atomic import replacing
from mhc_lightning.files.checksums import file_xxh3, json_sha256

_RESULT_FILE = "unit.json"
_HELD_OUT_FILE = "validation.npy"
_BATCH_BYTES = 1 << 20
_PART_BYTES = 1 << 20  # of a long document


@dataclass
class UnitResult:
    """The result of one unit, as its `unit.json` holds it.

    Attributes:
        train: Counts of the training split.
        validation: Counts of the validation split.
        skipped: Counts of input that was left out.
        chunks: litdata's entries for the training chunks, each with its checksums.
        config: litdata's configuration of these chunks; empty if there are none.
        held_out: Checksum of the file of held-out tokens; empty if there are none.
        members: Files in archives, and what each was taken for.
    """

    train: TextCounts
    validation: TextCounts
    skipped: Skipped
    chunks: list[dict[str, Any]]
    config: dict[str, Any]
    held_out: str = ""
    members: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class TokenizationOptions:
    """Options that are equal for all units of one run.

    Attributes:
        reading: How documents are read.
        chunk_bytes: Largest size of a chunk file.
    """

    reading: ReadingOptions
    chunk_bytes: int


def unit_folder(folder: Path, unit: int) -> Path:
    """The folder of a unit's chunks and result."""
    return folder / f"{unit:06d}"


def tokenize_unit(
    unit: WorkUnit, folder: Path, tokenizer: Tokenizer, options: TokenizationOptions
) -> None:
    """Write a unit's training chunks and held-out tokens; `folder` appears when complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    train, validation, log = TextCounts(), TextCounts(), ReadingLog()
    held_out_tokens: list[np.ndarray] = []

    def training_tokens() -> Iterator[np.ndarray]:
        documents = unit.documents(options.reading, log)
        parts = (part for each in documents for part in _parts(each, options.reading.cuts))
        for batch in _batches(parts):
            training = [document for document in batch if not document.held_out]
            held_out = [document for document in batch if document.held_out]
            if held_out:
                held_out_tokens.append(_encode(held_out, tokenizer, validation))
            if training:
                yield _encode(training, tokenizer, train)

    with replacing(folder, durable=False) as aside:
        aside.mkdir()
        chunks, config = write_chunks(training_tokens(), aside, options.chunk_bytes)
        if held_out_tokens:
            np.save(aside / _HELD_OUT_FILE, np.concatenate(held_out_tokens))
        checksum = file_xxh3(aside / _HELD_OUT_FILE) if held_out_tokens else ""
        content = asdict(
            UnitResult(train, validation, log.skipped, chunks, config, checksum, log.members)
        )
        content["checksum"] = json_sha256(content)
        (aside / _RESULT_FILE).write_text(json.dumps(content))


def read_result(folder: Path) -> UnitResult:
    """The result of a finished unit.

    Raises:
        OSError, ValueError, KeyError, TypeError: The result is missing or was changed.
    """
    content = json.loads((folder / _RESULT_FILE).read_text())
    if content.pop("checksum") != json_sha256(content):
        raise ValueError(f"{folder / _RESULT_FILE} is damaged")
    return UnitResult(
        TextCounts(**content["train"]),
        TextCounts(**content["validation"]),
        Skipped(**content["skipped"]),
        content["chunks"],
        content["config"],
        content["held_out"],
        [(name, description) for name, description in content["members"]],
    )


def is_finished(folder: Path) -> bool:
    """True if a unit is finished and all its files are as they were written."""
    try:
        result = read_result(folder)
        checksums = {chunk["filename"]: chunk["xxh3"] for chunk in result.chunks}
        if result.held_out:
            checksums[_HELD_OUT_FILE] = result.held_out
        return all(file_xxh3(folder / name) == expected for name, expected in checksums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_held_out(folder: Path) -> np.ndarray | None:
    """The held-out tokens of a finished unit, or None."""
    path = folder / _HELD_OUT_FILE
    return np.load(path) if path.exists() else None


def _parts(document: Document, cuts: TextCuts) -> Iterator[Document]:
    """A long document in parts with the tokens of the whole: encoding takes 60 times their size."""
    data, start = document.data, 0
    while cuts.proven and not cuts.anywhere and len(data) - start > _PART_BYTES:
        cut = cuts.find_in_bytes(data, start + _PART_BYTES)
        if cut < 0:
            break
        begins = document.begins and not start
        yield Document(data[start:cut], document.held_out, ends=False, begins=begins)
        start = cut
    yield replace(document, data=data[start:], begins=False) if start else document


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents: one call of the tokenizer for each short document would be slow."""
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


def _encode(documents: list[Document], tokenizer: Tokenizer, counts: TextCounts) -> np.ndarray:
    """Tokens of the documents one after the other, each between its beginning and its end.

    A token that ends documents and begins them too is between them once.
    """
    end = np.array([tokenizer.end_of_document], dtype=tokenizer.dtype)
    begin = np.array(tokenizer.beginning, dtype=tokenizer.dtype)
    begin = begin[begin != tokenizer.end_of_document]
    parts: list[np.ndarray] = []
    encoded = tokenizer.encode_documents([document.data for document in documents])
    for document, tokens in zip(documents, encoded, strict=True):
        parts += [begin] * document.begins + [tokens] + [end] * document.ends
        counts.documents += document.ends
        counts.unproven_cuts += not document.proven_cut
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
