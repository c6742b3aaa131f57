"""Turn text into a prepared folder: litdata token chunks, a held-out split and a record.

Work is done beside the output, in ``.OUTPUT.preparing``, one unit of input at a time. The output
appears under its name only when all of it is written, and a run after an interrupted one keeps the
units that were finished.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_lightning.data import hub
from mhc_lightning.data.assemble import assemble
from mhc_lightning.data.documents import find_text_files
from mhc_lightning.data.pool import Job, run_units
from mhc_lightning.data.prepared import FORMAT, RECORD_FILE, SPLITS, TRAIN, VALIDATION, Record
from mhc_lightning.data.shard import Counts, ShardOptions
from mhc_lightning.data.tokenizers import load_tokenizer
from mhc_lightning.data.units import Unit, plan_units
from mhc_lightning.errors import UserError

_SMALLEST_UNIT, _LARGEST_UNIT = 1 << 20, 1 << 25
_USUAL_UNITS = 16


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` did.

    Attributes:
        output: The prepared folder.
        record: Its record, with the counts of each split.
        seconds: How long it took.
        reused: Whether the folder was there already, made from the same input and settings.
    """

    output: Path
    record: Record
    seconds: float
    reused: bool = False

    @property
    def total(self) -> Counts:
        """Counts of both splits together."""
        total = Counts()
        for split in SPLITS:
            total.add(self.record.counts[split])
        return total

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, over both splits."""
        return self.total.bytes / self.total.tokens

    def __str__(self) -> str:
        skipped = self.record.skipped
        notes = [
            f"{self.bytes_per_token:.3f} bytes per token",
            *_counted(skipped.binary_files, "binary file", "skipped"),
            *_counted(skipped.empty_documents, "empty document", "skipped"),
            *_counted(self.total.invalid_utf8, "document", "with invalid UTF-8"),
            f"{self.seconds:.1f} s",
        ]
        lines = [f"{self.output} {'was prepared already' if self.reused else 'is prepared'}"]
        for split in SPLITS:
            counts = self.record.counts[split]
            lines.append(
                f"  {split:<10} {counts.documents:>12,} documents {counts.tokens:>15,} tokens"
                f" {counts.bytes:>15,} bytes"
            )
        return "\n".join([*lines, f"  {' · '.join(notes)}"])


def _counted(number: int, what: str, how: str) -> list[str]:
    return [f"{number:,} {what}{'s' if number != 1 else ''} {how}"] if number else []


def prepare(
    input: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path = "bytes",
    end_of_document: str | None = None,
    text_field: str = "text",
    validation_fraction: float = 0.01,
    num_workers: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    chunk_bytes: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareSummary:
    """Tokenize text into a folder that :class:`mhc_lightning.TextDataModule` streams from.

    The result depends on the input and the settings only, not on the number of workers. A document
    is held out by a hash of its content; where only a few plain-text files are given, the end of
    each file is held out instead.

    Args:
        input: Files, folders (read recursively) and ``hf://NAME[/CONFIG][:SPLIT]`` datasets.
            Plain text of any extension, ``.jsonl``, and ``.gz`` or ``.zst`` of these.
        output: The folder to make.
        tokenizer: ``bytes``, or the path of a ``tokenizer.json``.
        end_of_document: The token of a ``tokenizer.json`` that ends a document; found by its
            usual names if not given.
        text_field: Key of the text in JSONL lines, column of the text in datasets.
        validation_fraction: Share of the documents to hold out, at least 0 and below 1.
        num_workers: Processes; by default one per available core.
        include: Shell patterns of the files to take; all if empty.
        exclude: Shell patterns of files and folders to leave out.
        chunk_bytes: Text per chunk file, in bytes; by default a sixteenth of the input, between
            1 and 32 MiB.
        overwrite: Replace an output that was prepared from other input or with other settings.
        progress: Show a progress bar on standard error.

    Raises:
        UserError: Input or settings are wrong, the output exists, or it cannot be written.
    """
    began = time.monotonic()
    output = Path(output).absolute()
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f"validation_fraction is {validation_fraction}; give a share from 0 to below 1"
        )
    if num_workers is not None and num_workers < 1:
        raise UserError(f"num_workers is {num_workers}; prepare needs at least 1")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise UserError(f"chunk_bytes is {chunk_bytes}; give a positive number of bytes")
    chosen = load_tokenizer(tokenizer, end_of_document)
    work = output.with_name(f".{output.name}.preparing")
    inputs = [input] if isinstance(input, str | Path) else list(input)
    settings = {
        "input": [str(each) for each in inputs],
        "tokenizer": str(tokenizer),
        "text_field": text_field,
        "validation_fraction": validation_fraction,
        "include": list(include),
        "exclude": list(exclude),
        "chunk_bytes": chunk_bytes,
    }
    paths = [each for each in inputs if not str(each).startswith(hub.PREFIX)]
    files = find_text_files(paths, include, exclude, not_below=[output, work])
    datasets = [hub.open_dataset(str(each)) for each in inputs if each not in paths]
    if not files and not datasets:
        matching = " that match include=… and exclude=…" if include or exclude else ""
        raise UserError(f"no files in {_names(inputs)}{matching}; name a folder or files with text")
    unit_bytes = chunk_bytes or min(
        _LARGEST_UNIT, max(_SMALLEST_UNIT, sum(file.size for file in files) // _USUAL_UNITS)
    )
    # What the result depends on; the paths before the files' names are not part of it.
    identity = _checksum(
        {
            **{key: value for key, value in settings.items() if key not in ("input", "tokenizer")},
            "format": FORMAT,
            "tokenizer": chosen.fingerprint,
            "files": [(file.name, file.size, file.modified) for file in files],
            "datasets": [dataset.identity for dataset in datasets],
        }
    )
    found = _existing(output, identity, overwrite)
    if found is not None:
        return PrepareSummary(output, found, time.monotonic() - began, reused=True)

    def make() -> Record:
        units: list[Unit] = [*plan_units(files, unit_bytes, validation_fraction)]
        for dataset in datasets:
            units += hub.plan_rows(dataset, unit_bytes, text_field)
        limit = unit_bytes * chosen.dtype.itemsize * 3 // 2
        options = ShardOptions(text_field, validation_fraction, limit)
        _resume_or_clear(work, identity)
        run_units(Job(units, work / "units", chosen, options), num_workers, progress)
        record = assemble(work, len(units), chosen, options, identity, settings, _names(inputs))
        _publish(work, output)
        return record

    record = _exclusively(work, output, make)
    return PrepareSummary(output, record, time.monotonic() - began)


def _names(inputs: Sequence[str | Path]) -> str:
    return ", ".join(map(str, inputs)) or "an empty list of inputs"


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _existing(output: Path, identity: str, overwrite: bool) -> Record | None:
    """The record of a finished output of the same identity; None if the output may be written.

    Raises:
        UserError: Something else is there.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        record = Record.from_json((output / RECORD_FILE).read_bytes())
    except (OSError, ValueError):
        raise UserError(
            f"output {output} exists and is not a prepared folder; choose another output"
        ) from None
    if record.identity == identity and all(
        (output / chunk.name).is_file() and (output / chunk.name).stat().st_size == chunk.size
        for split in (TRAIN, VALIDATION)
        for chunk in record.chunks[split]
    ):
        return record
    if overwrite:
        return None
    state = "is damaged" if record.identity == identity else "holds other input or settings"
    raise UserError(f"output {output} {state}; choose another output, or say overwrite=true")


def _exclusively(work: Path, output: Path, make: Callable[[], Record]) -> Record:
    """Run ``make`` while no other process prepares the same output."""
    from filelock import FileLock, Timeout

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = work.with_suffix(".lock")
        with FileLock(lock, timeout=0):
            record = make()
            lock.unlink(missing_ok=True)
            return record
    except Timeout as error:
        raise UserError(
            f"output {output} is being prepared by another process; wait for it"
        ) from error
    except OSError as error:
        raise UserError(
            f"output {output} cannot be written: {error.strerror or error};"
            " what is finished is kept, run `prepare` again"
        ) from error


def _resume_or_clear(work: Path, identity: str) -> None:
    """Keep the finished units of an interrupted run of the same identity, and nothing else."""
    plan = work / "plan.json"
    try:
        same = json.loads(plan.read_text())["identity"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        plan.write_text(json.dumps({"identity": identity}))


def _publish(work: Path, output: Path) -> None:
    if output.exists():
        replaced = work / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
    os.replace(work / "final", output)
    shutil.rmtree(work, ignore_errors=True)
