"""The command line inside this process, which has imported everything already."""

import contextlib
import io
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def run_main(*words: str, folder: Path | str = ".", code: int = 0) -> tuple[str, str]:
    """Run a command in `folder`, as `python -m mhc_lightning WORDS` does, and capture its output.

    Signals, several devices, imports and tracebacks need a process of their own instead.

    Args:
        words: The command line.
        folder: The working directory while it runs.
        code: The exit code that it must have.

    Returns:
        Standard output and standard error.
    """
    from mhc_lightning.cli.main import main

    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.chdir(folder), captured("stdout") as output, captured("stderr") as errors:
        try:
            returned = main(list(words))
        finally:
            signal.signal(signal.SIGTERM, handler)
    told = f"exit code {returned}\n{output()}\n{errors()}"
    assert returned == code, told
    assert "Traceback" not in errors(), told
    return output(), errors()


@contextlib.contextmanager
def captured(name: str) -> Iterator[Callable[[], str]]:
    """Send `sys.stdout` or `sys.stderr`, and the file descriptor behind it, to a temporary file.

    Args:
        name: `stdout` or `stderr`.

    Yields:
        A function that gives the text written so far.
    """
    number = {"stdout": 1, "stderr": 2}[name]
    stream, descriptor = getattr(sys, name), os.dup(number)
    with tempfile.TemporaryFile() as file:
        text = ""

        def written() -> str:
            return text

        stream.flush()
        os.dup2(file.fileno(), number)
        replacement = io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), encoding="utf-8",
                                       write_through=True)  # fmt: skip
        setattr(sys, name, replacement)
        try:
            yield written
        finally:
            replacement.flush()
            setattr(sys, name, stream)
            os.dup2(descriptor, number)
            os.close(descriptor)
            file.seek(0)
            text = file.read().decode("utf-8", errors="surrogateescape")
