"""The recorded settings of a network: their comparison, and networks built from them."""

import importlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Connection, Transformer
from mhc_lightning.modules.construction import Sections, construct
from mhc_lightning.upcycling import Network

# Settings that matter in training alone: a trained network computes the same with any value.
_TRAINING_SETTINGS = (
    *("init_std", "bias_update_speed", "zero_start", "placement", "over_decoding_weight"),
    "train",
)
_PARTS = ("connection", "memory")  # sections within the section `model`
_NO_MEMORY = "mhc_lightning.modules.Memory"


def section_records(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What rebuilds a network, from the section `model` of a configuration, its parts within it.

    The record of a section is its class (dotted name, under `class`) and its arguments. A network
    without a memory has no record of one. Where the rows of a memory are is not recorded: it is
    the reader's choice.
    """
    records = {"model": _record(settings), "connection": _record(settings["connection"])}
    memory = settings.get("memory")
    if memory is not None and memory["_target_"] != _NO_MEMORY:
        records["memory"] = {k: v for k, v in _record(memory).items() if k != "placement"}
    return records


def _record(section: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {
        key: value
        for key, value in section.items()
        if key not in _PARTS and not key.startswith("_")
    }
    return {"class": section["_target_"], **arguments}


def differing_settings(recorded: Sections, configured: Sections) -> list[str]:
    """The settings in which two networks differ, each as `key=value (not …)`.

    Args:
        recorded: The `section_records` of a network.
        configured: Those of the other one; a setting that it does not give is not compared.
    """
    found = []
    for section in ("model", *_PARTS):
        ours, theirs = (
            records.get(section, {"class": _NO_MEMORY}) for records in (recorded, configured)
        )
        found += [
            f"{section}.{'_target_' if name == 'class' else name}={ours[name]} (not {theirs[name]})"
            for name in ours
            if name in theirs and name not in _TRAINING_SETTINGS and ours[name] != theirs[name]
        ]
    return found


def build_network(sections: Sections, source: str) -> Transformer:
    """A network from the records of its sections.

    Only subclasses of `Connection`, `Memory` and `Transformer` are called, whatever a record names.

    Args:
        sections: The `section_records` of the network.
        source: Name of the record's file, for error messages.

    Raises:
        UserError: A class is unknown or missing, or does not take the arguments.
    """
    return construct(sections, source, partial(_class_named, source), Transformer)


def build_outline(sections: Sections, source: str) -> Network:
    """As `build_network`, of any class that a `LanguageModel` trains, on `meta` if it can be."""
    find = partial(_class_named, source)
    on_meta = getattr(find(sections["model"]["class"], Network), "builds_on_meta", True)
    with torch.device("meta") if on_meta else nullcontext():
        return construct(sections, source, find, Network)


def connection_builder(section: Mapping[str, Any], source: str) -> Callable[..., Connection]:
    """What builds connections from `dim`, `num_streams` and `layer_index`.

    Args:
        section: The record of the section `connection`.
        source: Name of the record's file, for error messages.

    Raises:
        UserError: The class is unknown, or is no `Connection`.
    """
    arguments = {name: value for name, value in section.items() if name != "class"}
    return partial(_class_named(source, section["class"], Connection), **arguments)


def _class_named(source: str, name: str, base: Any) -> Any:
    module, _, attribute = str(name).rpartition(".")
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{source} names {name}, which cannot be imported: {error}") from error
    if not (isinstance(value, type) and issubclass(value, base)):
        kind = getattr(base, "__name__", "network")
        raise UserError(f"{source} names {name}, which is no {kind}")
    return value
