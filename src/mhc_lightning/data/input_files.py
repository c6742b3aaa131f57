"""Find the files of the inputs, and what each of them holds."""

import fnmatch
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mhc_lightning.data.documents import TextFile, open_bytes
from mhc_lightning.data.file_formats import (
    BINARY,
    PLAIN_TEXT,
    SAMPLE_BYTES,
    Form,
    form_of,
    stem_of,
)
from mhc_lightning.errors import UserError

_LONGEST_FIRST_LINE = 1 << 26
_FORMS_NAMED = 4


def find_text_files(
    inputs: Sequence[str | Path],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    not_below: Sequence[Path] = (),
    as_text: Sequence[str] = (),
    text_field: str = "text",
) -> list[TextFile]:
    """All files of the inputs, folders recursively, in a fixed order, and what each holds.

    Hidden files and folders (`.git`) and `__pycache__` are left out below a folder; a file that is
    named itself is always taken. Links to folders are followed, and each folder is read once.

    Args:
        inputs: Files and folders.
        include: Shell patterns; with any, only files that match one are taken. A pattern with a
            slash is compared with the path below the input, one without with each part of it.
        exclude: Shell patterns of files and folders to leave out.
        not_below: Folders that are not entered, such as the output.
        as_text: Shell patterns of files that are plain text whatever they look like.
        text_field: Key of the text in JSON Lines.

    Raises:
        UserError: An input does not exist, cannot be read, or is neither text nor binary: some
            form of documents that is not read here. A file that is named itself may also not be
            binary, and no file may come from two inputs.
    """
    files: list[TextFile] = []
    refused: dict[Form, list[TextFile]] = {}
    taken: dict[str, str | Path] = {}

    def take(file: TextFile, given: str | Path, named: bool) -> None:
        path = os.path.abspath(file.path)
        if path in taken:
            raise UserError(
                f"{path} comes twice, from input {taken[path]} and {given}; give it once"
                " (to see some text more often, prepare it apart and give its folder a weight)"
            )
        taken[path] = given
        form = Form(PLAIN_TEXT) if _matches(file.name, as_text) else _form(file, text_field)
        if form.mending or (named and form.name == BINARY):
            refused.setdefault(form, []).append(file)
        files.append(replace(file, form=form.name))

    for given in inputs:
        root = Path(given)
        try:
            if root.is_dir():
                for file in _walk(root, include, exclude, {p.resolve() for p in not_below}):
                    take(file, given, named=False)
            else:
                take(_text_file(root, root.name), given, named=True)
        except FileNotFoundError as error:
            raise UserError(f"input {error.filename} does not exist") from error
        except OSError as error:
            raise UserError(
                f"input {error.filename or root} cannot be read: {error.strerror};"
                " mend its permissions or leave it out with exclude=…"
            ) from error
    if refused:
        raise UserError(_refusal(refused))
    return files


def count_forms(files: Sequence[TextFile]) -> dict[str, dict[str, int]]:
    """How many files were taken for what: by form, then by the ending of their names."""
    counts: dict[str, dict[str, int]] = {}
    for file in files:
        ending = os.path.splitext(stem_of(file.name))[1] + file.compression
        of_form = counts.setdefault(file.form, {})
        of_form[ending or "no ending"] = of_form.get(ending or "no ending", 0) + 1
    return counts


def _form(file: TextFile, text_field: str) -> Form:
    with open_bytes(file) as stream:
        sample = stream.read(SAMPLE_BYTES)
        if b"\n" not in sample and stem_of(file.name).lower().endswith(".json"):
            sample += stream.readline(_LONGEST_FIRST_LINE)
        return form_of(file.name, sample, not stream.read(1), text_field)


def _refusal(refused: dict[Form, list[TextFile]]) -> str:
    """One line that names a file of each form, and how to go on."""
    cases = []
    for form, files in list(refused.items())[:_FORMS_NAMED]:
        more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        mending = f": {form.mending}" if form.mending else ""
        cases.append(f"{files[0].path}{more} looks like {form.name}{mending}")
    endings = {
        f"*{os.path.splitext(stem_of(file.name))[1]}{file.compression}"
        for files in refused.values()
        for file in files
    }
    patterns = "[" + ",".join(f"'{ending}'" for ending in sorted(endings)[:_FORMS_NAMED]) + "]"
    others = f"; and {len(refused) - _FORMS_NAMED} other forms" if len(refused) > len(cases) else ""
    return (
        f"not plain text or JSON Lines: {'; '.join(cases)}{others}. Or leave it out with"
        f" exclude={patterns}, or, if it is plain text, say as_text={patterns}"
    )


def _walk(
    root: Path, include: Sequence[str], exclude: Sequence[str], not_below: set[Path]
) -> list[TextFile]:
    def refuse(error: OSError) -> None:
        raise error

    found = []
    read = not_below - {root.resolve()}
    waiting = [root]  # then links to folders, after all that need none: these may lead in a circle
    while waiting:
        for folder, subfolders, names in os.walk(waiting.pop(0), onerror=refuse):
            resolved = Path(folder).resolve()
            if resolved in read:
                subfolders.clear()
                continue
            read.add(resolved)
            below = Path(folder).relative_to(root)
            subfolders[:] = [
                name
                for name in sorted(subfolders)
                if _is_visible(name) and not _matches((below / name).as_posix(), exclude)
            ]
            paths = [Path(folder, name) for name in subfolders]
            waiting += [path for path in paths if path.is_symlink()]
            for name in names:
                relative = (below / name).as_posix()
                if not _is_visible(name) or _matches(relative, exclude):
                    continue
                path = Path(folder, name)
                if (not include or _matches(relative, include)) and path.is_file():
                    found.append(_text_file(path, relative))
    return sorted(found, key=lambda file: file.name)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def _matches(relative: str, patterns: Sequence[str]) -> bool:
    parts = relative.split("/")
    return any(
        fnmatch.fnmatchcase(relative, pattern)
        if "/" in pattern
        else any(fnmatch.fnmatchcase(part, pattern) for part in parts)
        for pattern in patterns
    )


def _text_file(path: Path, name: str) -> TextFile:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"input {path} is no file; write what it gives to a file first")
    return TextFile(str(path), name, status.st_size, status.st_mtime_ns)
