"""An exported model, opened: the tensors, the settings of the network, and the tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_lightning.checkpoints.saved_memory import memory_of
from mhc_lightning.data.tokenizers import Tokenizer, tokenizer_from_record
from mhc_lightning.errors import UserError
from mhc_lightning.files.checksums import file_xxh3, json_sha256
from mhc_lightning.interchange.compatibility import check_tensors
from mhc_lightning.interchange.model_settings import (
    build_network,
    differing_settings,
    section_records,
)
from mhc_lightning.interchange.safetensors_files import StoredTensors, read_shapes, read_tensors
from mhc_lightning.modules import Memory, Transformer
from mhc_lightning.modules.memory.stored import belongs_to_memory, check_memory

CONFIG_FILE = "config.json"
FORMAT = "mhc-lightning"
FORMAT_VERSION = 1
HUGGINGFACE_MODEL_TYPE = "mhc"  # of the folders that transformers reads, in their config.json
HUGGINGFACE_PREFIX = "model."  # of the names of their tensors
TRAINING_TOKENIZER = "training_tokenizer"  # a folder in them, where theirs differs from ours


@dataclass(frozen=True)
class Exported:
    """An exported model whose record is read; the tensors are read on request.

    Attributes:
        folder: The folder.
        model: The class of the network (dotted name, under `class`) and its arguments.
        connection: The class of the connections and their arguments.
        memory: The class of the memory and its arguments; None without one.
        tokenizer_record: The record of the tokenizer.
        step: Optimizer steps of the training.
        files: XXH3 checksums of the tensor files; empty in folders of earlier versions, and in
            those that transformers reads, and may have written.
        document_mask: Whether the model was trained with documents kept apart.
        prefix: What names in the tensor files begin with, or not.
    """

    folder: Path
    model: dict[str, Any]
    connection: dict[str, Any]
    memory: dict[str, Any] | None
    tokenizer_record: dict[str, Any]
    step: int
    files: dict[str, str]
    document_mask: bool = False
    prefix: str = ""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with.

        Raises:
            UserError: The tokenizer's file is missing or was changed.
        """
        apart = self.folder / TRAINING_TOKENIZER
        return tokenizer_from_record(
            self.tokenizer_record, apart if apart.is_dir() else self.folder
        )

    def stored(self) -> StoredTensors:
        """The tensors by name, each read when it is looked up, unchecked."""
        return StoredTensors(self.folder, self.prefix)

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """What rebuilds the network: see `section_records`."""
        memory = {} if self.memory is None else {"memory": self.memory}
        return {"model": self.model, "connection": self.connection, **memory}

    def build(self) -> Transformer:
        """The network, on the current default device, with initial weights.

        Raises:
            UserError: A class is unknown, or does not take the arguments.
        """
        return build_network(self.sections, str(self.folder / CONFIG_FILE))

    def check_memory(self, memory: Memory) -> None:
        """Compare the memory with that of a network, by the constants in the tensor files.

        Raises:
            UserError: Names what differs.
        """
        hint = "give the settings in its config.json" if self.memory is not None else ""
        check_memory(memory, memory_of(self.stored()), str(self.folder), hint)

    def tensors(
        self, expected: Mapping[str, Tensor], *, new_memory: bool = False
    ) -> dict[str, Tensor]:
        """The tensors by name, checked against those of a model and in their order.

        Args:
            expected: The state dict of the model, on any device.
            new_memory: True to leave out the tensors of the model's memory, which the exported
                model does not have.

        Raises:
            UserError: Names the tensors that are missing, unexpected or of another shape, or a file
                that is missing or was changed since `export` wrote it.
        """
        if new_memory:
            expected = {n: tensor for n, tensor in expected.items() if not belongs_to_memory(n)}
        integers = [name for name, tensor in expected.items() if not tensor.is_floating_point()]
        integers += [f"{self.prefix}{name}" for name in integers]
        shapes = {
            name.removeprefix(self.prefix): shape
            for name, shape in read_shapes(self.folder, integers).items()
        }
        check_tensors(shapes, expected, str(self.folder))
        for name, checksum in self.files.items():
            file = self.folder / name
            if not file.is_file() or file_xxh3(file) != checksum:
                fault = "is damaged, or was changed" if file.is_file() else "was removed"
                raise UserError(
                    f"{file} {fault} since `export` wrote it (checksum); copy or export it again,"
                    f" or, if the change is meant, take {name} out of `files` and `checksum` out of"
                    f" {CONFIG_FILE}"
                )
        tensors = {n.removeprefix(self.prefix): t for n, t in read_tensors(self.folder).items()}
        return {name: tensors[name] for name in expected}


def is_exported(folder: Path) -> bool:
    """True if `folder` has the record file of an exported model."""
    return (folder / CONFIG_FILE).is_file()


def has_own_record(folder: Path) -> bool:
    """True if this package wrote the record in `folder`; other models have such files too."""
    try:
        record = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and (
        record.get("format") == FORMAT or record.get("model_type") == HUGGINGFACE_MODEL_TYPE
    )


def open_exported(folder: str | Path) -> Exported:
    """Read the record of an exported model.

    Raises:
        UserError: The folder has no record, or the record was changed or is of a later format.
    """
    folder = Path(folder)
    file = folder / CONFIG_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder} holds no exported model ({CONFIG_FILE}: {error.strerror or error});"
            " name a folder that `export` wrote"
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if isinstance(record, dict) and record.get("model_type") == HUGGINGFACE_MODEL_TYPE:
        return _of_transformers(folder, record)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{file} does not describe an exported model of mhc-lightning")
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} is of format {version}, and this version reads {FORMAT_VERSION};"
            " use the version that wrote it, or a newer one"
        )
    checksum = record.pop("checksum", None)
    if checksum not in (None, json_sha256(record)):
        raise UserError(
            f"{file} is damaged, or was changed since `export` wrote it (checksum); copy or export"
            " it again, or, if the change is meant, take its line `checksum` out"
        )
    try:
        return Exported(
            folder,
            dict(record["model"]),
            dict(record["connection"]),
            None if record.get("memory") is None else dict(record["memory"]),
            dict(record["tokenizer"]),
            int(record["step"]),
            dict(record.get("files", {})),
            record.get("document_mask") is True,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is incomplete: {error!r}") from error


def _of_transformers(folder: Path, record: Mapping[str, Any]) -> Exported:
    """A folder that `export form=huggingface`, or an `MhcForCausalLM`, has written."""
    file = folder / CONFIG_FILE
    if isinstance(record.get("upcycled"), dict):
        base = record["upcycled"].get("base", {}).get("architectures") or ["model"]
        raise UserError(
            f"{folder} is an upcycled {base[0]}, not a model of this package's Transformer; read it"
            " with AutoModelForCausalLM.from_pretrained, after import mhc_lightning.huggingface"
        )
    if record.get("tokenizer") is None:
        raise UserError(
            f"{file} does not say with which tokenizer the model was trained; copy `tokenizer` from"
            " the config.json of the model that it was made from"
        )
    try:
        sections = record["network"]
        memory = sections.get("memory")
        return Exported(
            folder,
            dict(sections["model"]),
            dict(sections["connection"]),
            None if memory is None else dict(memory),
            dict(record["tokenizer"]),
            int(record.get("step", 0)),
            {},
            record.get("document_end") is not None,
            HUGGINGFACE_PREFIX,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is incomplete: {error!r}") from error


def load_exported(folder: str | Path) -> Transformer:
    """The network of an exported model with its weights, on the CPU, in evaluation mode.

    Raises:
        UserError: The folder holds no exported model, or its tensors do not fit the network.
    """
    exported = open_exported(folder)
    # Building a network draws the seed of its initial weights, which are not used here.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = exported.build()
    tensors = exported.tensors(model.state_dict())
    exported.check_memory(model.memory)
    if exported.document_mask:
        model.mask_documents(exported.tokenizer().end_of_document)
    return materialize(model, tensors)


def materialize(model: Transformer, tensors: Mapping[str, Tensor]) -> Transformer:
    """Replace the `meta` tensors of a network by `tensors`, and set evaluation mode."""
    model.load_state_dict(tensors, assign=True)  # keeps the dtypes of the file
    return model.eval()


def check_settings(
    exported: Exported, settings: Mapping[str, Any], *, new_memory: bool = False
) -> None:
    """Compare an exported model's settings with configured ones; tensors do not show settings.

    Args:
        exported: The exported model.
        settings: The section `model` of a configuration, its parts within it.
        new_memory: True if the configured memory is not that of the exported model, which has none.

    Raises:
        UserError: Names the settings that differ.
    """
    configured = section_records(settings)
    if new_memory:
        configured.pop("memory", None)
    changes = differing_settings(exported.sections, configured)
    if changes:
        raise UserError(
            f"{exported.folder} is a model of other settings; give {', '.join(changes)}"
        )
