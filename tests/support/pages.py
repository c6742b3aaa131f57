"""Does what a page of the documentation says: writes its files, runs its code and its commands."""

import contextlib
import io
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from in_process import run_main

_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"[-−]?\d[\d.,:]*(?:e[-+]?\d+)?")


class Block(NamedTuple):
    """A block of code: its language, the file that it is titled with, and what it holds."""

    language: str
    title: str | None
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The blocks of code of a page, in order."""
    found = []
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        title = re.search(r'title="([^"]+)"', match["options"])
        text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        found.append(Block(match["language"], title[1] if title else None, text))
    return found


def write_files(pages: Sequence[Path], folder: Path) -> None:
    """Write the titled blocks of pages to a folder."""
    for block in (block for page in pages for block in blocks_of(page)):
        if block.title and block.language != "text":
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")


def follow(
    page: Path,
    folder: Path,
    before: Sequence[Path] = (),
    skip: str = "(?!)",
    more: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Do what a page says, in a folder of its own.

    A block with a title is written to that file, a block of Python without one is run, and so are
    commands. A block of `text` is what the command before it prints, except for the numbers.

    Args:
        page: The page.
        folder: Where a reader would be.
        before: Pages whose files this one goes on with.
        skip: Regular expression of commands that are not run.
        more: Settings added to this package's commands, by their names, that keep them small.

    Returns:
        What was printed.
    """
    write_files([*before, page], folder)
    with _as_in(folder):
        return _follow(page, folder, skip, more or {})


def _follow(page: Path, folder: Path, skip: str, more: Mapping[str, Sequence[str]]) -> str:
    names: dict[str, Any] = {"__name__": "page"}
    printed, everything = "", ""
    for block in blocks_of(page):
        if block.language == "text":
            _compare(block.text, printed)
            continue
        if block.title:
            continue
        if block.language == "python":
            with _captured() as output:
                exec(compile(block.text, str(page), "exec"), names)
            printed = output.getvalue()
        elif block.language == "console":
            printed = ""
            lines = re.sub(r"\s+# .*", "", block.text.replace("\\\n", " "), flags=re.MULTILINE)
            for line in filter(None, map(str.strip, lines.splitlines())):
                if not re.search(skip, line):
                    printed += _run(line, folder, more)
        else:
            raise AssertionError(f"{page.name} has {block.language} that nothing runs or reads")
        everything += printed
    return everything


def _run(line: str, folder: Path, more: Mapping[str, Sequence[str]]) -> str:
    """Run one command, Python's in this process, and return what it prints."""
    words = shlex.split(line)
    if words[0] == "TRITON_INTERPRET=1":  # as all tests are run
        words = words[1:]
    if words[0] != "python":
        command = ["bash", "-c", line]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout
    if words[1:3] == ["-m", "mhc_lightning"]:
        return "".join(run_main(*words[3:], *more.get(words[3], ())))
    with _captured() as output:
        if words[1:3] == ["-m", "pytest"]:
            ended = pytest.main(["-q", "-p", "no:cacheprovider", *words[3:]])
            assert ended == 0, output.getvalue()
        else:
            sys.argv = words[1:]
            runpy.run_path(str(folder / words[1]), run_name="__main__")
            sys.path[:] = [str(folder), *(path for path in sys.path if path != str(folder))]
    return output.getvalue()


@contextlib.contextmanager
def _as_in(folder: Path) -> Iterator[None]:
    """Be in a folder whose modules can be imported, as a new process would be."""
    argv, path, modules, environment = sys.argv, list(sys.path), set(sys.modules), dict(os.environ)
    root = logging.getLogger()  # Hydra sets handlers of its own
    level, handlers = root.level, list(root.handlers)
    sys.path.insert(0, str(folder))
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        sys.argv, sys.path[:] = argv, path
        os.environ.clear()
        os.environ.update(environment)
        root.setLevel(level)
        root.handlers[:] = handlers
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder):
                del sys.modules[name]


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield output


def _compare(shown: str, printed: str) -> None:
    """See that each line was printed, in this order, whatever the numbers; `…` is anything."""
    lines = iter([_masked(line) for line in printed.splitlines()])
    for line in filter(None, map(_masked, shown.splitlines())):
        if line != "…":
            pattern = re.escape(line).replace("…", ".*")
            assert any(re.fullmatch(pattern, other) for other in lines), (
                f"the page shows {line!r}, but printed was\n{printed}"
            )


def _masked(line: str) -> str:
    return re.sub(r"\s+", " ", _NUMBER.sub("0", line)).strip()
