"""`prepare` turns text into litdata token chunks, with a validation split and a record.

The files are written beside the output, in `.OUTPUT.preparing`, one work unit of input at a time.
The output appears under its name only when it is complete. A run after an interrupted one keeps the
finished units.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mhc_lightning.data import hub_datasets
from mhc_lightning.data.conversation_text import ConversationText, require_records
from mhc_lightning.data.conversation_tokenizer import ConversationTokenizer
from mhc_lightning.data.documents import ReadingOptions
from mhc_lightning.data.file_formats import BINARY, format_by_name
from mhc_lightning.data.input_files import find_input_files
from mhc_lightning.data.input_urls import is_url
from mhc_lightning.data.prepare_summary import PrepareSummary
from mhc_lightning.data.prepared_data import PreparedData
from mhc_lightning.data.prepared_record import FORMAT, RECORD_FILE, PreparedRecord
from mhc_lightning.data.prepared_writing import write_prepared
from mhc_lightning.data.record_text import RecordText
from mhc_lightning.data.text_files import TextFile
from mhc_lightning.data.tokenizers import Tokenizer, load_tokenizer
from mhc_lightning.data.unit_tokenization import TokenizationOptions
from mhc_lightning.data.work_units import WorkUnit, plan_units
from mhc_lightning.data.worker_pool import TokenizationJob, run_units
from mhc_lightning.errors import UserError
from mhc_lightning.files.atomic import put_in_place
from mhc_lightning.files.checksums import json_sha256

_SMALLEST_UNIT, _LARGEST_UNIT = 1 << 20, 1 << 25
_USUAL_UNITS = 16
# Settings that an identity holds otherwise: as files, as a fingerprint, and some only if set.
_NOT_IDENTITY = ("input", "tokenizer", "as_text", "text_template", "on_bad_record")
_NO_CHANGE: tuple[Any, ...] = ([], None, "stop")


def prepare(
    input: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path = "bytes",
    end_of_document: str | None = None,
    begin_of_document: str | None = None,
    text_field: str = "text",
    text_template: str | None = None,
    on_bad_record: str = "stop",
    conversations: bool = False,
    validation_fraction: float = 0.01,
    num_workers: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    as_text: Sequence[str] = (),
    max_expansion: float = 200,
    storage_options: dict[str, Any] | None = None,
    chunk_bytes: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareSummary:
    r"""Tokenize text into a folder that `TextDataModule` streams from.

    The result depends on the input and the settings only, not on the number of workers. A document
    is held out by a hash of its content. Of only a few plain-text files, the end of each file is
    held out instead.

    Args:
        input: Files, folders (read recursively), URLs of these, and datasets of the hub as
            `hf://NAME[/CONFIG][:SPLIT]`.
            Plain text of any extension; records of JSON Lines, JSON arrays, CSV, TSV, Parquet and
            Arrow; WARC; ZIP and tar archives of these; `.gz`, `.zst`, `.bz2` or `.xz` of them.
            Binary files in folders are left out; other formats of documents are refused.
        output: The folder to write.
        tokenizer: `bytes`, a `tokenizer.json`, a folder of transformers, a name on the Hugging
            Face hub, or a GGUF file.
        end_of_document: The token of a `tokenizer.json` that ends a document; by default the
            `eos_token` of the `tokenizer_config.json` beside it, else the first usual name.
        begin_of_document: The token that a document begins with, empty for none; by default the one
            that the tokenizer puts before each text.
        text_field: Field of a record that holds its text; `data.text` for one inside another.
        text_template: Fields joined to a text, such as `{title}\n\n{body}`; replaces `text_field`.
        on_bad_record: `stop` at a record without text, or `skip` and count such records.
        conversations: Records are `messages`, or a `prompt` and its `completion`, and only answers
            are predicted: see `mhc_lightning.data.conversations`.
        validation_fraction: Share of the documents to hold out, at least 0 and below 1.
        num_workers: Processes; by default one per available core.
        include: Shell patterns of the files to take; all if empty.
        exclude: Shell patterns of files and folders to leave out.
        as_text: Shell patterns of files that are plain text, whatever they look like.
        max_expansion: A compressed file or member may unpack to so many times its size (below
            64 MiB, to anything); more is taken for a decompression bomb.
        storage_options: Options of the file systems behind URLs, as fsspec takes them.
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
    if on_bad_record not in ("stop", "skip"):
        raise UserError(f"on_bad_record is {on_bad_record!r}; it is stop or skip")
    if not max_expansion >= 1:
        raise UserError(f"max_expansion is {max_expansion}; give a number from 1")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise UserError(f"chunk_bytes is {chunk_bytes}; give a positive number of bytes")
    if conversations and text_template is not None:
        raise UserError("text_template=… makes texts; leave it out, or conversations=true")
    chosen = load_tokenizer(tokenizer, end_of_document, begin_of_document)
    work = output.with_name(f".{output.name}.preparing")
    inputs = [input] if isinstance(input, str | Path) else list(input)
    settings = {
        "input": [str(each) for each in inputs],
        "tokenizer": str(tokenizer),
        "text_field": text_field,
        "text_template": text_template,
        "on_bad_record": on_bad_record,
        "validation_fraction": validation_fraction,
        "include": list(include),
        "exclude": list(exclude),
        "as_text": list(as_text),
        "chunk_bytes": chunk_bytes,
        **({"conversations": True} if conversations else {}),
    }
    text = ConversationText() if conversations else RecordText(text_field, text_template)
    paths = [each for each in inputs if is_url(str(each)) or not _is_dataset(each)]
    found = find_input_files(
        paths, include, exclude, [output, work], as_text, text, storage_options
    )
    files = [file for file in found if file.format != BINARY]
    if conversations:
        require_records(files)
    datasets = [hub_datasets.open_dataset(str(each)) for each in inputs if each not in paths]
    if not found and not datasets:
        matching = " that match include=… and exclude=…" if include or exclude else ""
        raise UserError(f"no files in {_names(inputs)}{matching}; name a folder or files with text")
    unit_bytes = chunk_bytes or min(
        _LARGEST_UNIT, max(_SMALLEST_UNIT, sum(file.size for file in found) // _USUAL_UNITS)
    )
    encoder = ConversationTokenizer(chosen) if conversations else chosen
    identity = _identity(settings, encoder, found, datasets)
    existing = _existing(output, identity, overwrite)
    if existing is not None:
        return PrepareSummary(output, existing, time.monotonic() - began, reused=True)

    reading = ReadingOptions(
        text,
        validation_fraction,
        on_bad_record == "skip",
        max_expansion,
        tuple(include),
        tuple(exclude),
        tuple(as_text),
        chosen.cuts,
    )
    taken = [(file.name, file.description) for file in found]

    def write() -> PreparedRecord:
        units: list[WorkUnit] = [*plan_units(files, unit_bytes, reading)]
        for dataset in datasets:
            units += hub_datasets.plan_rows(dataset, unit_bytes, text)
        limit = unit_bytes * encoder.dtype.itemsize * 3 // 2
        options = TokenizationOptions(reading, limit)
        _resume_or_clear(work, identity)
        run_units(TokenizationJob(units, work / "units", encoder, options), num_workers, progress)
        record = write_prepared(
            work, len(units), encoder, limit, identity, settings, _names(inputs), taken
        )
        _publish(work, output)
        return record

    record = _exclusively(work, output, write)
    return PrepareSummary(output, record, time.monotonic() - began)


def _identity(
    settings: dict[str, Any],
    tokenizer: Tokenizer,
    files: Sequence[TextFile],
    datasets: Sequence[hub_datasets.HubDataset],
) -> str:
    """Checksum of everything that the result depends on.

    The checksum leaves out the folders of the files. It includes the format of a file only where
    the name suggests another format: so folders of earlier versions are recognised.
    """
    template: dict[str, str] = {}
    if isinstance(tokenizer, ConversationTokenizer):
        template = tokenizer.template_checksums()
    return json_sha256(
        {
            **{key: value for key, value in settings.items() if key not in _NOT_IDENTITY},
            **{key: settings[key] for key in _NOT_IDENTITY[2:] if settings[key] not in _NO_CHANGE},
            "format": FORMAT,
            "tokenizer": tokenizer.fingerprint,
            **({"template": template} if template else {}),
            "files": [
                (file.name, file.size, file.modified)
                + ((file.version,) if file.version else ())
                + (
                    (file.description,)
                    if file.description not in (format_by_name(file.name), BINARY)
                    else ()
                )
                for file in files
            ],
            "datasets": [dataset.identity for dataset in datasets],
        }
    )


def _is_dataset(given: str | Path) -> bool:
    return str(given).startswith(hub_datasets.PREFIX)


def _names(inputs: Sequence[str | Path]) -> str:
    return ", ".join(map(str, inputs)) or "an empty list of inputs"


def _existing(output: Path, identity: str, overwrite: bool) -> PreparedRecord | None:
    """The record of a finished output of the same identity; None if the output may be written.

    Raises:
        UserError: The output exists, and is something else or damaged.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        record = PreparedRecord.from_json((output / RECORD_FILE).read_bytes())
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
            existing = PreparedData(output)
        except UserError as error:
            state = f"is damaged ({error})"
        else:
            if record.files or not overwrite:  # a missing checksum is a reason to overwrite
                return existing.record
    if overwrite:
        return None
    raise UserError(f"output {output} {state}; choose another output, or say overwrite=true")


def _exclusively(work: Path, output: Path, write: Callable[[], PreparedRecord]) -> PreparedRecord:
    """Call `write` while no other process prepares the same output."""
    from filelock import FileLock, Timeout

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = work.with_suffix(".lock")
        with FileLock(lock, timeout=0):
            record = write()
            lock.unlink(missing_ok=True)
            return record
    except Timeout as error:
        raise UserError(
            f"output {output} is being prepared by another process; wait for it"
        ) from error
    except OSError as error:
        raise UserError(
            f"output {output} cannot be written: {error.strerror or error};"
            " finished work is kept, run `prepare` again"
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
    put_in_place(work / "final", output)
    shutil.rmtree(work, ignore_errors=True)
