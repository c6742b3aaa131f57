"""Commands of this package, shown before they run."""

import shlex
import subprocess
import sys
from pathlib import Path


def shown(file: Path) -> str:
    """A file as one would type it here: from the working directory if it is below that."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def command(*words: str) -> list[str]:
    """The command line that runs a command of this package."""
    return [sys.executable, "-m", "mhc_lightning", *words]


def show(*words: str) -> None:
    """Print a command as one would type it."""
    print(f"\n$ python -m mhc_lightning {shlex.join(words)}", flush=True)


def run(*words: str, capture: bool = False) -> str:
    """Show and run a command of this package; returns its standard output if captured.

    Raises:
        SystemExit: It failed; with its exit code.
    """
    show(*words)
    stdout = subprocess.PIPE if capture else None
    done = subprocess.run(command(*words), stdout=stdout, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""
