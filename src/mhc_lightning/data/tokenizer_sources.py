"""Where a tokenizer comes from: a `tokenizer.json`, and what transformers makes one of.

A folder without a `tokenizer.json` and a GGUF file are read by transformers, which writes the
tokenizer into a temporary folder of this process.
"""

import atexit
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from mhc_lightning.data.tokenizer_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from mhc_lightning.errors import UserError, one_line_message
from mhc_lightning.files.hub import hub_folder, is_hub_name

# What transformers reads a tokenizer from, where there is no `tokenizer.json`.
_OTHER_FILES = ("tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "tiktoken.model")
_HUB_PATTERNS = (TOKENIZER_FILE, "*token*.json", "chat_template*", "merges.txt", *_OTHER_FILES)


def tokenizer_file(spec: str | Path) -> Path:
    """The `tokenizer.json` that a setting means; it need not exist.

    Args:
        spec: Such a file, a folder with one, a folder that transformers reads, a name on the
            Hugging Face hub, or a GGUF file.

    Raises:
        UserError: It cannot be fetched, or transformers cannot read it.
    """
    path = Path(spec)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"tokenizer={spec} is not there; give a GGUF file that is")
        return _converted(str(path.parent), path.name, path.stem, path.stat().st_mtime_ns)
    if path.is_dir():
        return _in_folder(path, path.name)
    if is_hub_name(str(spec)) and path.suffix != ".json":
        return _in_folder(hub_folder(str(spec), _HUB_PATTERNS, "tokenizer"), path.name)
    return path


def _has_tokenizer(folder: Path) -> bool:
    """True if a folder has files of a tokenizer."""
    return any((folder / name).is_file() for name in (TOKENIZER_FILE, *_OTHER_FILES))


def _in_folder(folder: Path, name: str) -> Path:
    file = folder / TOKENIZER_FILE
    if file.is_file() or not _has_tokenizer(folder):
        return file
    config = folder / TOKENIZER_CONFIG_FILE
    changed = config.stat().st_mtime_ns if config.is_file() else 0
    return _converted(str(folder), None, name, changed)


@lru_cache
def _converted(folder: str, gguf_file: str | None, name: str, changed: int) -> Path:
    """The `tokenizer.json` that transformers makes of a tokenizer, with what belongs to it.

    Args:
        folder: The folder with the files.
        gguf_file: The GGUF file in it; None for a folder of transformers.
        name: What the tokenizer is called.
        changed: A value that changes with the files.
    """
    given = folder if gguf_file is None else str(Path(folder) / gguf_file)
    try:
        from transformers import AutoTokenizer

        more: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, **more)
    except ImportError as error:
        raise UserError(
            f"tokenizer={given} is read by transformers and a library that is not installed"
            f' ({one_line_message(error)}): pip install "mhc-lightning[huggingface]"'
        ) from error
    except Exception as error:  # of any file there
        raise UserError(
            f"tokenizer={given} cannot be read by transformers ({one_line_message(error)}); give a"
            " tokenizer.json, or a folder that has one"
        ) from error
    temporary = tempfile.mkdtemp(prefix="tokenizer_")
    target = Path(temporary) / name
    atexit.register(_remove, temporary, os.getpid())
    tokenizer.save_pretrained(target)
    if not (target / TOKENIZER_FILE).is_file():
        raise UserError(
            f"tokenizer={given} is a {type(tokenizer).__name__}, which has no tokenizer.json; use"
            " a tokenizer that has one"
        )
    return target / TOKENIZER_FILE


def _remove(folder: str, process: int) -> None:
    """Remove a folder, unless this is a fork of the process that made it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
