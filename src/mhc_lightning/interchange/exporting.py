"""`export_model` writes a model as a folder: safetensors, settings and tokenizer."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mhc_lightning
from mhc_lightning.checkpoints.saved_memory import memory_of
from mhc_lightning.checkpoints.saved_tensors import describe
from mhc_lightning.data.tokenizer_files import TOKENIZER_FILE
from mhc_lightning.data.tokenizers import JsonTokenizer, Tokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.files.atomic import replacing
from mhc_lightning.files.checksums import file_xxh3, json_sha256
from mhc_lightning.interchange.compatibility import check_tensors, is_plain
from mhc_lightning.interchange.exported_model import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    is_exported,
)
from mhc_lightning.interchange.model_settings import build_network, section_records
from mhc_lightning.interchange.safetensors_files import write_tensors
from mhc_lightning.modules import Transformer
from mhc_lightning.modules.memory.stored import check_memory

SHARD_BYTES = 5_000_000_000


def export_model(
    model: Transformer | Mapping[str, Tensor],
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    tokenizer: Tokenizer,
    step: int = 0,
    document_mask: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a model as safetensors with a `config.json` and its tokenizer.

    The files are written beside `folder`, which appears only when it is complete.

    Args:
        model: The network, or its state dict, whose tensors are looked up one file at a time.
        folder: The new folder.
        settings: The section `model` of the run's configuration, `connection` and `memory` within
            it (`_target_` names a class).
        tokenizer: The tokenizer that the model was trained with.
        step: Optimizer steps of the training.
        document_mask: Whether the model was trained with documents kept apart.
        shard_bytes: Largest number of bytes of tensors in one file.
        overwrite: Replace an exported model that the folder already holds.

    Raises:
        UserError: The settings are not those of this model, the model is quantised, the tokenizer
            has more ids than the model, or the folder is taken or cannot be written.
    """
    record: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "mhc_lightning_version": mhc_lightning.__version__,
        **section_records(settings),
        "tokenizer": tokenizer.record(),
        "step": step,
        **({"document_mask": True} if document_mask else {}),
    }
    tensors = check_export(model, settings, tokenizer)
    with new_folder(Path(folder), overwrite) as aside:
        write_tensors(tensors, aside, shard_bytes)
        if isinstance(tokenizer, JsonTokenizer):
            shutil.copyfile(tokenizer.path, aside / TOKENIZER_FILE)
        written = sorted(aside.glob("*.safetensors"))
        record["files"] = {file.name: file_xxh3(file) for file in written}
        record["checksum"] = json_sha256(record)
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (aside / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def check_export(
    model: Transformer | Mapping[str, Tensor], settings: Mapping[str, Any], tokenizer: Tokenizer
) -> Mapping[str, Tensor]:
    """The tensors of a model to export, checked against its settings and its tokenizer.

    Raises:
        UserError: See `export_model`.
    """
    tensors = model.state_dict() if isinstance(model, Transformer) else model
    with torch.device("meta"):
        rebuilt = build_network(section_records(settings), "the configuration")
    described, expected = describe(tensors), rebuilt.state_dict()
    quantised = next((n for n, t in described.items() if not is_plain(t, expected.get(n))), None)
    if quantised is not None:
        raise UserError(
            f"the model to export holds a tensor that is no plain weight, {quantised} (is it"
            " quantised?); export the model it was made from"
        )
    check_memory(rebuilt.memory, memory_of(tensors), "the model to export")
    check_tensors(
        {name: tensor.shape for name, tensor in described.items()}, expected, "the model to export"
    )
    if tokenizer.vocab_size > rebuilt.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {rebuilt.vocab_size}:"
            " it is not the one that the model was trained with"
        )
    return tensors


@contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which takes the name of `folder` at the end.

    Raises:
        UserError: The name is taken, or the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not is_exported(folder):
            raise UserError(f"{folder} holds something else; choose another output")
        if not overwrite:
            raise UserError(
                f"{folder} already holds a model; choose another output, or replace it"
                " (overwrite=true)"
            )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as aside:
            aside.mkdir()
            yield aside
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
