"""What the files of a folder are, by their content, and which of them are held out."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mhc_lightning.data.prepared_record import TRAIN, VALIDATION
from mhc_lightning.data.token_data.arrow_rows import ARROW, STATE, read_datasets
from mhc_lightning.data.token_data.bin_files import read_bin
from mhc_lightning.data.token_data.datatrove import DATATROVE, read_datatrove
from mhc_lightning.data.token_data.litdata_chunks import INDEX, LITDATA, read_litdata
from mhc_lightning.data.token_data.megatron import MEGATRON, read_megatron
from mhc_lightning.data.token_data.token_file import TokenFile
from mhc_lightning.errors import UserError

_TEST = "test"
_SPLIT_WORDS = {
    **dict.fromkeys(("val", "valid", "validation"), VALIDATION),
    "test": _TEST,
    "train": TRAIN,
}


@dataclass(frozen=True)
class Found:
    """The token data of a folder.

    Attributes:
        kind: What the files were taken for.
        files: Those of each split, in the order of their names.
        not_read: Names of the other files.
    """

    kind: str
    files: dict[str, list[TokenFile]]
    not_read: list[str]


def find_token_files(path: Path) -> Found | None:
    """The token data at a path; None if there are none.

    Args:
        path: A folder, a file, or the common part of the names of a `.bin` and an `.idx`.

    Raises:
        UserError: A file is damaged, or the files are of several formats or types.
    """
    index = path.with_name(f"{path.name}.idx")
    if path.is_dir():
        names = _files_below(path)
    elif path.is_file():
        names = [path.with_suffix(".idx") if _is_indexed(path) else path]
    elif index.is_file():
        names = [index]
    else:
        return None
    taken: dict[Path, tuple[str, TokenFile]] = {}
    beside: set[Path] = set()
    for file in _indices_first(names):
        if file not in taken and file not in beside:
            for kind, data, others in _read(file):
                taken[data.path] = kind, data
                beside |= others
    if not taken:
        _refuse_parquet(path, names)
        return None
    _check_same(taken)
    splits: dict[str, list[TokenFile]] = {TRAIN: [], VALIDATION: [], _TEST: []}
    for file in sorted(taken):
        split = _split_of(file.relative_to(path)) if path.is_dir() else TRAIN
        splits[split].append(taken[file][1])
    tests = [file.path for file in splits.pop(_TEST)]
    if not splits[TRAIN]:
        raise UserError(
            f"data.path {path} has no files to train on: by their names"
            f" {', '.join(file.name for file in taken)} are for validation or tests; name a file"
            " itself to train on it"
        )
    rest = [file for file in names if file not in taken and file not in beside]
    not_read = [file.relative_to(path).as_posix() for file in sorted([*rest, *tests])]
    kind = next(iter(taken.values()))[0]
    return Found(kind, splits, not_read if path.is_dir() else [])


def _files_below(root: Path) -> list[Path]:
    """All visible files; linked folders are followed, each once."""

    def refuse(error: OSError) -> None:
        raise UserError(f"data.path {error.filename} cannot be read: {error.strerror}") from error

    files, visited = [], set()
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        resolved = Path(folder).resolve()
        if resolved in visited:
            subfolders.clear()
            continue
        visited.add(resolved)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        files += [path for path in paths if path.is_file()]
    return sorted(files)


def _is_indexed(path: Path) -> bool:
    return path.suffix == ".bin" and path.with_suffix(".idx").is_file()


def _indices_first(names: Iterable[Path]) -> list[Path]:
    """Files that say what others are, before these."""
    return sorted(names, key=lambda file: (file.suffix not in (".json", ".idx"), file))


def _read(file: Path) -> list[tuple[str, TokenFile, set[Path]]]:
    """The token files that a file is or names: kind, file, and what else belongs to it."""
    if file.name == INDEX:
        return [(LITDATA, chunk, {file}) for chunk in read_litdata(file) or []]
    if file.name == STATE:
        own = {file.with_name(name) for name in (STATE, "dataset_info.json")}
        own.add(file.parent.parent / "dataset_dict.json")
        return [(ARROW, rows, own) for rows in read_datasets(file) or []]
    if file.suffix == ".idx":
        return [(MEGATRON, read_megatron(file), {file})]
    if file.suffix == ".ds":
        own = {file.with_name(f"{file.name}.{end}") for end in ("index", "metadata", "loss")}
        return [(DATATROVE, read_datatrove(file), own)]
    if file.suffix == ".bin":
        return [(*read_bin(file), set())]
    return []


def _check_same(taken: dict[Path, tuple[str, TokenFile]]) -> None:
    """Check that all files are of one format and type."""
    (first, (kind, data)), *others = taken.items()
    for file, (other, more) in others:
        if other != kind:
            raise UserError(
                f"data.path holds files of several formats: {first} ({kind}) and {file} ({other});"
                " give each format as a source of its own"
            )
        if more.dtype != data.dtype:
            raise UserError(
                f"{first} has tokens of type {data.dtype.name} and {file} of type"
                f" {more.dtype.name}, so they were probably made with different tokenizers; give"
                " those of one tokenizer alone"
            )


def _split_of(name: Path) -> str:
    """The split that a name says: that of the file, else of a folder; training if none does."""
    for part in (name.stem, *reversed(name.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return TRAIN


def _refuse_parquet(path: Path, names: list[Path]) -> None:
    if any(file.suffix == ".parquet" for file in names):
        raise UserError(
            f"data.path {path} holds Parquet files, of which no part can be read alone; make data"
            f" of their text by `prepare input={path} output=…`, and save tokens as a `datasets`"
            " folder: load_dataset('parquet', data_files=…).save_to_disk(…)"
        )
