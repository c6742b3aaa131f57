"""An exported model: a folder of tensors, what is needed to build the network, its tokenizer."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_lightning.data.tokenizers import Tokenizer, tokenizer_from_record
from mhc_lightning.errors import UserError
from mhc_lightning.files.checksums import file_xxh3, json_sha256
from mhc_lightning.interchange.compatibility import check_tensors
from mhc_lightning.interchange.safetensors_files import read_shapes, read_tensors
from mhc_lightning.modules import Connection, Transformer

CONFIG_FILE = "config.json"
FORMAT = "mhc-lightning"
FORMAT_VERSION = 1
_OF_TRAINING = ("init_std", "bias_update_speed")  # a trained network computes the same with any


@dataclass(frozen=True)
class Exported:
    """An exported model, opened: its record is read, its tensors are not yet.

    Attributes:
        folder: Where it lies.
        model: The network's class (dotted name, under `class`) and its arguments.
        connection: The same of the connections.
        tokenizer_record: What `tokenizer` is built from.
        step: Optimizer steps that it was trained for.
        files: XXH3 checksums of the tensors' files; empty in folders of earlier versions.
    """

    folder: Path
    model: dict[str, Any]
    connection: dict[str, Any]
    tokenizer_record: dict[str, Any]
    step: int
    files: dict[str, str]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with.

        Raises:
            UserError: Its file is missing or is not the one that was exported.
        """
        return tokenizer_from_record(self.tokenizer_record, self.folder)

    def build(self) -> Transformer:
        """The network, on the device that is set; initialised, not loaded.

        Raises:
            UserError: A class is unknown, or does not take the arguments.
        """
        return build_network(self.model, self.connection, str(self.folder / CONFIG_FILE))

    def tensors(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by name, in the order of those wanted, once they are known to be those.

        Args:
            wanted: A state dict, on any device.

        Raises:
            UserError: Names the tensors that are missing, left over or of another shape, or a file
                that is not what `export` wrote, or not there.
        """
        check_tensors(read_shapes(self.folder), wanted, str(self.folder))
        for name, checksum in self.files.items():
            file = self.folder / name
            if not file.is_file() or file_xxh3(file) != checksum:
                found = "is damaged, or was changed" if file.is_file() else "was removed"
                raise UserError(
                    f"{file} {found} since `export` wrote it (checksum); copy or export it again,"
                    f" or, if the change is meant, take {name} out of `files` and `checksum` out of"
                    f" {CONFIG_FILE}"
                )
        tensors = read_tensors(self.folder)
        return {name: tensors[name] for name in wanted}


def is_exported(folder: Path) -> bool:
    """Whether `folder` looks like what `export` writes."""
    return (folder / CONFIG_FILE).is_file()


def holds_own_record(folder: Path) -> bool:
    """Whether the record in `folder` is of this package: other models have such files, too."""
    try:
        record = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("format") == FORMAT


def open_exported(folder: str | Path) -> Exported:
    """Read the record of an exported model.

    Raises:
        UserError: The folder holds none, one that was changed, or one of a later format.
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
            dict(record["tokenizer"]),
            int(record["step"]),
            dict(record.get("files", {})),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is incomplete: {error!r}") from error


def load_exported(folder: str | Path) -> Transformer:
    """The network of an exported model with its weights, on the CPU, in evaluation mode.

    Raises:
        UserError: The folder holds no exported model, or its tensors are not those of the network.
    """
    exported = open_exported(folder)
    # A network draws the seed of its initial weights, which nothing asks for here.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = exported.build()
    return bring_to_life(model, exported.tensors(model.state_dict()))


def bring_to_life(model: Transformer, tensors: Mapping[str, Tensor]) -> Transformer:
    """Give a network on `meta` tensors, as they are, and make it ready to evaluate."""
    model.load_state_dict(tensors, assign=True)  # in the dtypes of the file
    return model.eval()


def section_record(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a configuration as a class and its plain arguments, without a connection."""
    own = {k: v for k, v in section.items() if k != "connection" and not k.startswith("_")}
    return {"class": section["_target_"], **own}


def check_settings(exported: Exported, settings: Mapping[str, Any]) -> None:
    """Compare the settings that an exported model was built with, which its tensors don't tell.

    Args:
        exported: The exported model.
        settings: The section `model` of a configuration, `connection` within it.

    Raises:
        UserError: Names those that differ.
    """
    changes = other_settings(exported.model, exported.connection, settings)
    if changes:
        raise UserError(
            f"{exported.folder} is a model of other settings; give {', '.join(changes)}"
        )


def other_settings(
    model: Mapping[str, Any], connection: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[str]:
    """What differs from the section `model` of a configuration, each as `key=value (not …)`.

    Args:
        model: The `section_record` to compare with.
        connection: Its connection's.
        settings: The section, `connection` within it.
    """
    sections = {
        "model": (model, section_record(settings)),
        "connection": (connection, section_record(settings["connection"])),
    }
    return [
        f"{section}.{'_target_' if name == 'class' else name}={theirs[name]} (not {ours[name]})"
        for section, (theirs, ours) in sections.items()
        for name in theirs
        if name in ours and name not in _OF_TRAINING and theirs[name] != ours[name]
    ]


def build_network(
    model: Mapping[str, Any], connection: Mapping[str, Any], where: str
) -> Transformer:
    """A network from the two sections of a record.

    Nothing but connections and Transformers is ever called, whatever the record names.

    Raises:
        UserError: A class is unknown, or does not take the arguments.
    """
    for name, section in (("model", model), ("connection", connection)):
        if "class" not in section:
            raise UserError(f"{where} is incomplete: {name} names no class")
    connection_class = _class_named(connection["class"], Connection, where)
    model_class = _class_named(model["class"], Transformer, where)
    try:
        return model_class(
            connection=partial(connection_class, **_arguments(connection)), **_arguments(model)
        )
    except TypeError as error:
        reason = str(error).partition("\n")[0]  # torch adds where in its own code
        raise UserError(f"{where} does not fit this version: {reason}") from error


def _arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != "class"}


def _class_named(name: str, base: type, where: str) -> Any:
    module, _, attribute = str(name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where} names {name}, which cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{where} names {name}, which is no {base.__name__}")
    return found
