"""The text that recipes train on where there is nothing to download: Python's standard library."""

import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from commands import run


def standard_library() -> Path:
    """The folder of this Python's own modules.

    Raises:
        SystemExit: They come without their sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "argparse.py").is_file():
        raise SystemExit(
            f"error: the standard library of {sys.executable} comes without its source text"
            f" ({folder} has no argparse.py); use another Python: make quickstart PYTHON=..."
        )
    return folder


def prepare_words(config: str, output: str) -> list[str]:
    """The words of a `prepare` command for it; what is there already and the same is kept."""
    return [
        *("prepare", "--config", config, f"input={standard_library()}", f"output={output}"),
        "include=['*.py']",
        "exclude=[site-packages,dist-packages,test,tests,idle_test,__pycache__]",
        *("prepare.validation_fraction=0.05", "overwrite=true"),
    ]


def prepare_library(config: str, overrides: Iterable[str]) -> None:
    """Prepare it as ``data/python`` for an experiment, unless another text is set for it.

    Raises:
        SystemExit: It failed.
    """
    if not any(word.startswith("data.path=") for word in overrides):
        run(*prepare_words(config, "data/python"))
