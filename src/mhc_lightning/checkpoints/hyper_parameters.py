"""What is saved of a LightningModule beside its weights, so that it can be built again: plain data.

The records of a module are the sections of its network (`modules.construction.Sections`) and the
section `optimizer`. Loggers get them as they are. Checkpoints have them in LightningCLI's form, by
`class_path` and `init_args`: it reads the hyper-parameters of a checkpoint that it resumes from.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.mixins import hparams_mixin

from mhc_lightning.modules.construction import PARTS, UNKNOWN, Sections, dotted_name, plain
from mhc_lightning.optimizers.recipes import OptimizerRecipe

HYPER_PARAMETERS = pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY


def records_of(model: Any, optimizer: Any) -> dict[str, dict[str, Any]]:
    """The records of a module's network and optimizer recipe; of an unknown one, why it is."""
    sections = getattr(model, "construction", None) or {
        "model": _unknown(model, "it is no Transformer of this package")
    }
    return {**sections, "optimizer": _recipe_record(optimizer)}


def _recipe_record(recipe: Any) -> dict[str, Any]:
    if not isinstance(recipe, OptimizerRecipe):
        return _unknown(recipe, "it is no OptimizerRecipe of this package")
    values = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.init}
    try:
        return {"class": dotted_name(type(recipe)), **plain(values)}
    except TypeError as error:
        return _unknown(recipe, str(error))


def _unknown(thing: Any, reason: str) -> dict[str, Any]:
    return {"class": f"{type(thing).__module__}.{type(thing).__qualname__}", UNKNOWN: reason}


def hyper_parameters(records: Sections, **settings: Any) -> dict[str, Any]:
    """Hyper-parameters in LightningCLI's form; what is unknown is left out.

    Args:
        records: As `records_of` gives them.
        settings: Further arguments of the module, plain data.
    """
    saved = {name: _class_and_arguments(section) for name, section in records.items()}
    parts = {name: saved.pop(name) for name in PARTS if name in saved}
    saved["model"]["init_args"] |= parts
    known = {name: form for name, form in saved.items() if UNKNOWN not in records[name]}
    # Within LightningCLI: whether the module's class was chosen by its configuration.
    given = getattr(hparams_mixin, "_given_hyperparameters", None)
    chosen = (given.get() if given is not None else None) or {}
    return {**{k: v for k, v in chosen.items() if k == "_class_path"}, **known, **settings}


def keep_records(checkpoint: dict[str, Any], records: Sections) -> None:
    """Make a checkpoint's hyper-parameters plain data, whatever a subclass has saved as them.

    Why a part is unknown is noted, too.
    """
    saved = checkpoint.get(HYPER_PARAMETERS, {})
    saved = {name: value for name, value in saved.items() if name not in ("model", "optimizer")}
    checkpoint[HYPER_PARAMETERS] = {**saved, **hyper_parameters(records)}
    unknown = {name: dict(section) for name, section in records.items() if UNKNOWN in section}
    if unknown:
        checkpoint[UNKNOWN] = unknown


def saved_records(checkpoint: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The records in a checkpoint; those that it lacks are missing.

    Args:
        checkpoint: The checkpoint.
        values: Its hyper-parameters, or those that a logger has written to a file.
    """
    records = dict(checkpoint.get(UNKNOWN, {}))
    for name in ("model", *PARTS, "optimizer"):
        if isinstance(values.get(name), Mapping):
            records[name] = _record(values[name])
    model = records.get("model", {})
    for name in [name for name in PARTS if name in model]:
        records[name] = _record(model.pop(name))
    return records


def _class_and_arguments(record: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {name: value for name, value in record.items() if name != "class"}
    return {"class_path": record["class"], "init_args": arguments}


def _record(form: Any) -> dict[str, Any]:
    """The record in either form, or of a name alone."""
    if isinstance(form, str):
        return {"class": form}
    if "class_path" in form:
        return {"class": form["class_path"], **form.get("init_args", {})}
    return dict(form)
