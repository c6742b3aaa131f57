"""The recorded settings of a network: their comparison, and networks built from them."""

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Connection, Transformer

# Settings that matter in training alone: a trained network computes the same with any value.
_TRAINING_SETTINGS = ("init_std", "bias_update_speed")


def section_record(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a configuration: its class, and its arguments without the connection."""
    arguments = {
        key: value
        for key, value in section.items()
        if key != "connection" and not key.startswith("_")
    }
    return {"class": section["_target_"], **arguments}


def differing_settings(
    model: Mapping[str, Any], connection: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[str]:
    """The settings that differ from those of a configuration, each as `key=value (not …)`.

    Args:
        model: The `section_record` of a model.
        connection: The `section_record` of its connection.
        settings: The section `model` of the configuration, `connection` within it.
    """
    sections = {
        "model": (model, section_record(settings)),
        "connection": (connection, section_record(settings["connection"])),
    }
    return [
        f"{section}.{'_target_' if name == 'class' else name}={recorded[name]}"
        f" (not {configured[name]})"
        for section, (recorded, configured) in sections.items()
        for name in recorded
        if name in configured
        and name not in _TRAINING_SETTINGS
        and recorded[name] != configured[name]
    ]


def build_network(
    model: Mapping[str, Any], connection: Mapping[str, Any], source: str
) -> Transformer:
    """A network from the records of its two sections.

    Only subclasses of `Connection` and `Transformer` are called, whatever a record names.

    Args:
        model: The `section_record` of the network.
        connection: The `section_record` of its connections.
        source: Name of the record's file, for error messages.

    Raises:
        UserError: A class is unknown or missing, or does not take the arguments.
    """
    for name, section in (("model", model), ("connection", connection)):
        if "class" not in section:
            raise UserError(f"{source} is incomplete: {name} names no class")
    connection_class = _class_named(connection["class"], Connection, source)
    model_class = _class_named(model["class"], Transformer, source)
    try:
        return model_class(
            connection=partial(connection_class, **_arguments(connection)), **_arguments(model)
        )
    except TypeError as error:
        reason = str(error).partition("\n")[0]  # torch adds lines about its own code
        raise UserError(f"{source} does not fit this version: {reason}") from error


def _arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != "class"}


def _class_named(name: str, base: type, source: str) -> Any:
    module, _, attribute = str(name).rpartition(".")
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{source} names {name}, which cannot be imported: {error}") from error
    if not (isinstance(value, type) and issubclass(value, base)):
        raise UserError(f"{source} names {name}, which is no {base.__name__}")
    return value
