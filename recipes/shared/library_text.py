"""The text that recipes train on where there is nothing to download: Python's standard library."""

import sys
import sysconfig
from pathlib import Path


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
