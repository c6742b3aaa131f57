"""A LightningModule from its checkpoint alone.

Classes are looked up by the names in the checkpoint, and only some are called: those of this
package, those that the program has imported, and what the caller allows.
"""

import importlib
import inspect
import io
import sys
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mhc_lightning.checkpoints.folder_index import is_checkpoint_folder
from mhc_lightning.checkpoints.hyper_parameters import HYPER_PARAMETERS, saved_records
from mhc_lightning.checkpoints.reading import load_file, load_folder
from mhc_lightning.errors import UserError
from mhc_lightning.modules.construction import PARTS, UNKNOWN, construct, dotted_name
from mhc_lightning.optimizers.recipes import OptimizerRecipe
from mhc_lightning.upcycling import Network

_PACKAGE = "mhc_lightning"


def load_module(
    kind: Any,
    path: str | Path | IO[bytes],
    given: Mapping[str, Any],
    *,
    map_location: Any,
    hparams_file: str | Path | None,
    strict: bool | None,
    trusted: bool,
    allow: Collection[Any],
) -> Any:
    """A LightningModule of class `kind`, as a checkpoint has it: see its `load_from_checkpoint`.

    Raises:
        UserError: The checkpoint is refused, or does not say how the module is built.
    """
    source, checkpoint = _read(path, trusted)
    saved = checkpoint.get(HYPER_PARAMETERS, {}) if hparams_file is None else _yaml(hparams_file)
    records = saved_records(checkpoint, saved)
    with torch.random.fork_rng(devices=[]):  # the initial weights are not used
        module = kind(**_arguments(kind, records, saved, given, source, allow))
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    weights = dict(checkpoint["state_dict"])
    try:
        result = module.load_state_dict(
            weights, module.strict_loading if strict is None else strict
        )
    except RuntimeError as error:
        names = "; ".join(" ".join(line.split()) for line in str(error).splitlines()[1:])
        raise UserError(
            f"the weights of {source} are not those of the network that it describes ({names});"
            " if the network was changed after it was built, pass the changed one as model=…, or"
            " strict=False to load what fits"
        ) from error
    for names, fault in (
        (result.missing_keys, "without a value in"),
        (result.unexpected_keys, "not in the module but in"),
    ):
        if names:
            rank_zero_warn(f"{fault} {source}: {', '.join(names)}")
    return module.to(_device(map_location))


def _read(path: str | Path | IO[bytes], trusted: bool) -> tuple[str, dict[str, Any]]:
    """The name of a checkpoint for messages, and its content with weights in CPU memory."""
    if not isinstance(path, str | Path):
        return "the checkpoint", load_file(path, trusted=trusted)  # an open file
    if "://" in str(path):
        with get_filesystem(path).open(str(path), "rb") as file:
            return f"checkpoint {path}", load_file(io.BytesIO(file.read()), trusted=trusted)
    folder = Path(path).expanduser()
    if not str(path) or not folder.exists():
        raise UserError(f"no checkpoint at {str(path)!r}")
    if not folder.is_dir():
        return f"checkpoint {path}", load_file(folder, trusted=trusted)
    if not is_checkpoint_folder(folder):
        raise UserError(
            f"{path} is no checkpoint; name a file that a checkpoint callback wrote, or a folder"
            " step_… of a run's checkpoints/"
        )
    checkpoint = load_folder(folder, trusted=trusted)
    return f"checkpoint {path}", {**checkpoint, "state_dict": checkpoint["state_dict"].read()}


def _yaml(file: str | Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"hparams_file={file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"hparams_file={file} holds no hyper-parameters (it is no mapping)")
    return content


def _arguments(
    kind: Any,
    records: Mapping[str, Any],
    saved: Mapping[str, Any],
    given: Mapping[str, Any],
    source: str,
    allow: Collection[Any],
) -> dict[str, Any]:
    """The arguments of a module's class: those given, then those saved.

    Raises:
        UserError: An argument is unknown, or the checkpoint does not say how to build one.
    """
    parameters = inspect.signature(kind).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def taken(name: str) -> bool:
        return takes_any or name in parameters

    unknown = [name for name in given if not taken(name)]
    if unknown:
        raise UserError(
            f"{kind.__name__} takes no {', '.join(unknown)}; what may be given beside the"
            f" checkpoint: {', '.join(parameters)}"
        )
    objects = ("model", "optimizer")
    wanted = [name for name in objects if taken(name) and name not in given]
    missing = [f"{name}=…" for name in wanted if name not in records]
    if missing:
        raise UserError(
            f"{source} does not say how its module was built, as older ones do not; pass"
            f" {', '.join(missing)} to load_from_checkpoint"
        )
    for name in wanted:
        if UNKNOWN in records[name]:
            raise UserError(
                f"{source} cannot say how its {name}, a {records[name]['class']}, was built"
                f" ({records[name][UNKNOWN]}); pass {name}=… to load_from_checkpoint"
            )
    rest = {
        name: value
        for name, value in saved.items()
        if taken(name) and name not in (*objects, *PARTS) and not name.startswith("_")
    }
    find = partial(_find, source, tuple(allow))
    sections = {name: record for name, record in records.items() if name != "optimizer"}
    build = {
        "model": lambda: construct(sections, source, find, Network),
        "optimizer": lambda: _recipe(records["optimizer"], source, find),
    }
    return {**rest, **given, **{name: build[name]() for name in wanted}}


def _recipe(record: Mapping[str, Any], source: str, find: Any) -> Any:
    arguments = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record.items()
        if name != "class"
    }
    try:
        return find(record["class"], OptimizerRecipe)(**arguments)
    except TypeError as error:
        raise UserError(f"{source} does not fit this version: {error}") from error


def _find(source: str, allow: tuple[Any, ...], name: str, base: Any) -> Any:
    """What a dotted name in a checkpoint means, if it may be called to make a `base`.

    Raises:
        UserError: It may not, or does not exist.
    """
    name = str(name)
    module, _, attribute = name.rpartition(".")
    for allowed in allow:
        if not hasattr(allowed, "__qualname__"):
            raise UserError(f"allow takes classes and functions, not {allowed!r}")
        own, script = (
            f"{allowed.__module__}.",
            "__main__.",
        )  # where it is, and where it may have been
        if name in (dotted_name(allowed), *(f"{m}{allowed.__qualname__}" for m in (own, script))):
            return allowed
    if name.startswith(f"{_PACKAGE}."):
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"{source} names {name}, which this version does not have: {error}"
            ) from error
    else:
        found = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    if isinstance(found, type) and issubclass(found, base):
        return found
    kind = getattr(base, "__name__", "network")
    raise UserError(
        f"{source} names {name} as its {kind}, which is not imported or no subclass of it,"
        f" and strangers' names are not called; import it, and pass allow=[{attribute}] if you"
        " trust it"
    )


def _device(map_location: Any) -> torch.device:
    """The device on which a tensor of the CPU is loaded, as `torch.load` understands it."""
    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    return torch.load(file, map_location=map_location, weights_only=True).device
