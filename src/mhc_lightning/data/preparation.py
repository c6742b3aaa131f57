"""Turn text into a prepared folder: litdata token chunks, a held-out split and a record.

Work is done beside the output, in ``.OUTPUT.preparing``, one unit of input at a time. The output
appears under its name only when all of it is written, and a run after an interrupted one keeps the
units that were finished.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mhc_lightning.data import hub_datasets
from mhc_lightning.data.file_formats import BINARY, form_by_name
from mhc_lightning.data.input_files import count_forms, find_text_files
from mhc_lightning.data.prepared_data import PreparedData
from mhc_lightning.data.prepared_record import FORMAT, RECORD_FILE, SPLITS, Record
from mhc_lightning.data.prepared_writing import assemble
from mhc_lightning.data.tokenizers import load_tokenizer
from mhc_lightning.data.unit_tokenization import Counts, ShardOptions
from mhc_lightning.data.work_units import Unit, plan_units
from mhc_lightning.data.worker_pool import Job, run_units
from mhc_lightning.errors import UserError
from mhc_lightning.files.checksums import json_sha256

_SMALLEST_UNIT, _LARGEST_UNIT = 1 << 20, 1 << 25
_USUAL_UNITS = 16
_ENDINGS_NAMED = 6
_NOT_IDENTITY = ("input", "tokenizer", "as_text")  # told by files, fingerprint; if there are any


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
        unknown = self.total.unknown / self.total.tokens
        notes = [
            f"{self.bytes_per_token:.3f} bytes per token",
            *_counted(skipped.binary_files, "binary file", "skipped"),
            *_counted(skipped.empty_documents, "empty document", "skipped"),
            *_counted(self.total.invalid_utf8, "document", "with invalid UTF-8"),
            *_counted(self.total.with_nul, "document", "with NUL bytes"),
            *_counted(
                self.total.unknown,
                "token",
                f"of text that the tokenizer does not know ({unknown:.2%})",
            ),
            f"{self.seconds:.1f} s",
        ]
        lines = [f"{self.output} {'was prepared already' if self.reused else 'is prepared'}"]
        for split in SPLITS:
            counts = self.record.counts[split]
            lines.append(
                f"  {split:<10} {counts.documents:>12,} documents {counts.tokens:>15,} tokens"
                f" {counts.bytes:>15,} bytes"
            )
        lines.append(f"  {' · '.join(notes)}")
        for form, endings in self.record.forms.items():
            taken = "skipped as" if form == BINARY else "taken for"
            lines.append(f"  {taken} {form}: {_endings(endings)}")
        if self.record.files:
            lines.append("  checksums (XXH3, 128 bits) are checked when a file is first read")
        else:
            lines.append("  an earlier version made it, without checksums of all its files")
        return "\n".join(lines)


def _counted(number: int, what: str, how: str) -> list[str]:
    return [f"{number:,} {what}{'s' if number != 1 else ''} {how}"] if number else []


def _endings(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    often = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count:,} {ending}" for ending, count in often[:_ENDINGS_NAMED]]
    rest = [f"{len(often) - _ENDINGS_NAMED} other endings"] if len(often) > _ENDINGS_NAMED else []
    return f"{total:,} file{'s' if total != 1 else ''} ({', '.join(named + rest)})"


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
    as_text: Sequence[str] = (),
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
            Plain text of any extension, JSON Lines, and ``.gz`` or ``.zst`` of these. Binary
            files in folders are left out; other forms of documents (CSV, JSON arrays, Parquet,
            archives, UTF-16, …) are refused.
        output: The folder to make.
        tokenizer: ``bytes``, or the path of a ``tokenizer.json``.
        end_of_document: The token of a ``tokenizer.json`` that ends a document; found by its
            usual names if not given.
        text_field: Key of the text in JSONL lines, column of the text in datasets.
        validation_fraction: Share of the documents to hold out, at least 0 and below 1.
        num_workers: Processes; by default one per available core.
        include: Shell patterns of the files to take; all if empty.
        exclude: Shell patterns of files and folders to leave out.
        as_text: Shell patterns of files to take as plain text whatever they look like.
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
        "as_text": list(as_text),
        "chunk_bytes": chunk_bytes,
    }
    paths = [each for each in inputs if not str(each).startswith(hub_datasets.PREFIX)]
    found_files = find_text_files(
        paths, include, exclude, [output, work], as_text=as_text, text_field=text_field
    )
    files = [file for file in found_files if file.form != BINARY]
    datasets = [hub_datasets.open_dataset(str(each)) for each in inputs if each not in paths]
    if not found_files and not datasets:
        matching = " that match include=… and exclude=…" if include or exclude else ""
        raise UserError(f"no files in {_names(inputs)}{matching}; name a folder or files with text")
    unit_bytes = chunk_bytes or min(
        _LARGEST_UNIT, max(_SMALLEST_UNIT, sum(file.size for file in found_files) // _USUAL_UNITS)
    )
    # What the result depends on; the paths before the files' names are not part of it. A form is
    # where it is not what the name says, which leaves folders of earlier versions recognised.
    identity = json_sha256(
        {
            **{key: value for key, value in settings.items() if key not in _NOT_IDENTITY},
            **({"as_text": list(as_text)} if as_text else {}),
            "format": FORMAT,
            "tokenizer": chosen.fingerprint,
            "files": [
                (file.name, file.size, file.modified)
                + ((file.form,) if file.form not in (form_by_name(file.name), BINARY) else ())
                for file in found_files
            ],
            "datasets": [dataset.identity for dataset in datasets],
        }
    )
    found = _existing(output, identity, overwrite)
    if found is not None:
        return PrepareSummary(output, found, time.monotonic() - began, reused=True)

    def make() -> Record:
        units: list[Unit] = [*plan_units(files, unit_bytes, validation_fraction)]
        for dataset in datasets:
            units += hub_datasets.plan_rows(dataset, unit_bytes, text_field)
        limit = unit_bytes * chosen.dtype.itemsize * 3 // 2
        options = ShardOptions(text_field, validation_fraction, limit)
        _resume_or_clear(work, identity)
        run_units(Job(units, work / "units", chosen, options), num_workers, progress)
        forms = count_forms(found_files)
        record = assemble(
            work, len(units), chosen, options, identity, settings, _names(inputs), forms
        )
        _publish(work, output)
        return record

    record = _exclusively(work, output, make)
    return PrepareSummary(output, record, time.monotonic() - began)


def _names(inputs: Sequence[str | Path]) -> str:
    return ", ".join(map(str, inputs)) or "an empty list of inputs"


def _existing(output: Path, identity: str, overwrite: bool) -> Record | None:
    """The record of a finished output of the same identity; None if the output may be written.

    Raises:
        UserError: Something else is there.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        record = Record.from_json((output / RECORD_FILE).read_bytes())
    except OSError:
        raise UserError(
            f"output {output} exists and is not a prepared folder; choose another output"
        ) from None
    except ValueError as error:
        raise UserError(
            f"output {output} exists and its {RECORD_FILE} cannot be understood ({error});"
            " delete it, or choose another output"
        ) from None
    state = "holds other input or settings"
    if record.identity == identity:
        try:
            found = PreparedData(output)
        except UserError as error:
            state = f"is damaged ({error})"
        else:
            if record.files or not overwrite:  # to have checksums is a reason
                return found.record
    if overwrite:
        return None
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
