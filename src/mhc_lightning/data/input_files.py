"""The files below the inputs of `prepare`, each with its format; other formats are refused."""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mhc_lightning.data.file_formats import (
    BINARY,
    PLAIN_TEXT,
    TABLES,
    ZIP,
    FileFormat,
    sampled_format,
)
from mhc_lightning.data.formats.compression import compression_of, ending_of
from mhc_lightning.data.input_patterns import is_chosen, is_visible, matches
from mhc_lightning.data.input_urls import is_url, list_url
from mhc_lightning.data.record_text import RecordText
from mhc_lightning.data.text_files import TextFile, open_bytes, open_source
from mhc_lightning.errors import UserError

_FORMATS_NAMED = 4
_SIGNATURE_BYTES = 16
_TEXT = RecordText()


def find_input_files(
    inputs: Sequence[str | Path],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    not_below: Sequence[Path] = (),
    as_text: Sequence[str] = (),
    text: RecordText = _TEXT,
    storage_options: dict[str, Any] | None = None,
) -> list[TextFile]:
    """All files of the inputs with their formats, folders recursively, in a fixed order.

    Hidden files and folders (`.git`) and `__pycache__` are left out below a folder; a file given
    by name is always taken. Links to folders are followed, and each folder is read once.

    Args:
        inputs: Files and folders, and URLs of these.
        include: Shell patterns; with any, only files that match one are taken. A pattern with a
            slash is matched with the path below the input, one without with each part of it.
        exclude: Shell patterns of files and folders to leave out.
        not_below: Folders that are not entered, such as the output.
        as_text: Shell patterns of files that are plain text whatever they look like.
        text: The text of a record.
        storage_options: Options of the file systems behind URLs.

    Raises:
        UserError: An input does not exist or cannot be read, a file comes from two inputs, has a
            format of documents that is not read here, or is binary and was given by name.
    """
    files: list[TextFile] = []
    refused: dict[FileFormat, list[TextFile]] = {}
    origins: dict[str, str | Path] = {}

    def add(file: TextFile, given: str | Path, by_name: bool) -> None:
        path = file.path if is_url(file.path) else os.path.abspath(file.path)
        if path in origins:
            raise UserError(
                f"{path} comes twice, from input {origins[path]} and {given}; give it once"
                " (to see some text more often, prepare it apart and give its folder a weight)"
            )
        origins[path] = given
        file = replace(file, compression=_compression(file))
        is_text = matches(file.name, as_text)
        found = FileFormat(PLAIN_TEXT) if is_text else _format(file, text)
        if found.conversion or (by_name and found.name == BINARY):
            refused.setdefault(found, []).append(file)
        files.append(replace(file, format=found.name, encoding=found.encoding))

    for given in inputs:
        if is_url(str(given)):
            for file in _behind_url(str(given), include, exclude, storage_options):
                add(file, given, by_name=file.path == given)
            continue
        root = Path(given)
        try:
            if root.is_dir():
                for file in _walk(root, include, exclude, {p.resolve() for p in not_below}):
                    add(file, given, by_name=False)
            else:
                add(_text_file(root, root.name), given, by_name=True)
        except FileNotFoundError as error:
            raise UserError(f"input {error.filename} does not exist") from error
        except OSError as error:
            raise UserError(
                f"input {error.filename or root} cannot be read: {error.strerror};"
                " fix its permissions or leave it out with exclude=…"
            ) from error
    if refused:
        raise UserError(_refusal(refused))
    return files


def count_formats(files: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Number of files by what they were taken for, then by the ending of their names.

    Args:
        files: Names of files, and what each was taken for.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, description in files:
        endings = counts.setdefault(description, {})
        ending = ending_of(name) or "no ending"
        endings[ending] = endings.get(ending, 0) + 1
    return counts


def _compression(file: TextFile) -> str:
    with open_source(file) as raw:
        return compression_of(file.name, raw.read(_SIGNATURE_BYTES))


def _format(file: TextFile, text: RecordText) -> FileFormat:
    with open_bytes(file) as stream:
        found, _ = sampled_format(stream, file.name, text)
    if file.compression and found.name in (*TABLES, ZIP):
        return FileFormat(f"{found.name} that is compressed", "decompress it")
    return found


def _refusal(refused: dict[FileFormat, list[TextFile]]) -> str:
    """One line that names a file of each refused format, and the ways to continue."""
    cases = []
    for refused_format, files in list(refused.items())[:_FORMATS_NAMED]:
        more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        fix = f": {refused_format.conversion}" if refused_format.conversion else ""
        cases.append(f"{files[0].path}{more} looks like {refused_format.name}{fix}")
    endings = {f"*{ending_of(file.name)}" for files in refused.values() for file in files}
    patterns = "[" + ",".join(f"'{ending}'" for ending in sorted(endings)[:_FORMATS_NAMED]) + "]"
    others = (
        f"; and {len(refused) - _FORMATS_NAMED} other formats" if len(refused) > len(cases) else ""
    )
    return (
        f"formats that are not read here: {'; '.join(cases)}{others}. Or leave it out with"
        f" exclude={patterns}, or, if it is plain text, say as_text={patterns}"
    )


def _walk(
    root: Path, include: Sequence[str], exclude: Sequence[str], not_below: set[Path]
) -> list[TextFile]:
    def refuse(error: OSError) -> None:
        raise error

    files = []
    visited = not_below - {root.resolve()}
    # Linked folders come after all others: links may form a cycle.
    waiting = [root]
    while waiting:
        for folder, subfolders, names in os.walk(waiting.pop(0), onerror=refuse):
            resolved = Path(folder).resolve()
            if resolved in visited:
                subfolders.clear()
                continue
            visited.add(resolved)
            below = Path(folder).relative_to(root)
            subfolders[:] = [
                name
                for name in sorted(subfolders)
                if is_visible(name) and not matches((below / name).as_posix(), exclude)
            ]
            paths = [Path(folder, name) for name in subfolders]
            waiting += [path for path in paths if path.is_symlink()]
            for name in names:
                relative = (below / name).as_posix()
                if not is_visible(name) or not is_chosen(relative, include, exclude):
                    continue
                path = Path(folder, name)
                if path.is_file():
                    files.append(_text_file(path, relative))
    return sorted(files, key=lambda file: file.name)


def _behind_url(
    url: str, include: Sequence[str], exclude: Sequence[str], options: dict[str, Any] | None
) -> Iterator[TextFile]:
    for path, name, size, version in list_url(url, options):
        hidden = not all(map(is_visible, name.split("/")))
        if path == url or not (hidden or not is_chosen(name, include, exclude)):
            yield TextFile(path, name, size, 0, version=version, storage_options=options)


def _text_file(path: Path, name: str) -> TextFile:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"input {path} is no regular file; write its content to a file first")
    return TextFile(str(path), name, status.st_size, status.st_mtime_ns)
