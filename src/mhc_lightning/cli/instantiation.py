"""From a section of a configuration to the object that its `_target_` names."""

import logging
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from mhc_lightning.cli.composition import Experiment, escaped_tree
from mhc_lightning.cli.value_types import check_arguments
from mhc_lightning.errors import UserError

# It would show errors that are raised and caught here a second time.
logging.getLogger("hydra.utils").disabled = True


def build(experiment: Experiment, section: str, **more: Any) -> Any:
    """Instantiate a section of the configuration.

    Args:
        experiment: The experiment.
        section: Dotted key of a mapping with a `_target_`.
        more: Arguments beside, or in place of, those in the configuration.

    Raises:
        UserError: the section is missing, or its target or a value in it cannot be used.
    """
    node = require_section(experiment, section)
    target = _imported(section, node._target_)
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    arguments = {str(k): v for k, v in plain.items() if not str(k).startswith("_")}
    check_arguments(section, target, {k: v for k, v in arguments.items() if k not in more})
    for key, value in node.items():
        if isinstance(value, DictConfig) and "_target_" in value and value.get("_partial_"):
            inner = {k: v for k, v in arguments[str(key)].items() if not k.startswith("_")}
            check_arguments(str(key), _imported(str(key), value._target_), inner)
    # Hydra resolves what it is given and then reads it, each of which takes one escape.
    given = escaped_tree(escaped_tree({k: v for k, v in plain.items() if k not in more}))
    try:
        factory = hydra.utils.instantiate({"_convert_": "all", **given, "_partial_": True})
    except InstantiationException as error:
        raise _cause(error) from error
    return factory(**more)


def target_of(experiment: Experiment, section: str) -> Any:
    """The class or function that a section's `_target_` names.

    Raises:
        UserError: the section is missing, or its target cannot be imported.
    """
    return _imported(section, require_section(experiment, section)._target_)


def require_section(experiment: Experiment, section: str) -> DictConfig:
    """A section of the configuration that has a `_target_`.

    Raises:
        UserError: there is none.
    """
    node = OmegaConf.select(experiment.config, section)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise UserError(
            f"config {experiment.file.name} has no section {section!r} with a _target_;"
            f" choose one from the group: `- {section}: …` under `defaults:`"
        )
    return node


def build_members(experiment: Experiment, section: str) -> list[Any]:
    """Instantiate every named member of a section, leaving out those set to null.

    Raises:
        UserError: as `build`, or one is not what Lightning takes there.
    """
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger

    members = experiment.values().get(section) or {}
    present = [name for name, member in members.items() if member is not None]
    built = [build(experiment, f"{section}.{name}") for name in present]
    kind = {"callbacks": Callback, "logger": Logger}[section]
    for name, member in zip(present, built, strict=True):
        if not isinstance(member, kind):
            raise UserError(
                f"{section}.{name} is a {type(member).__qualname__}, not a {kind.__name__} of"
                " lightning.pytorch"
            )
    return built


def _imported(section: str, name: str) -> Any:
    try:
        return hydra.utils.get_object(name)
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(
            f"{section}._target_={name} cannot be imported ({' '.join(str(cause).split())});"
            " is the name right, and is its package installed?"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """The error behind Hydra's: a `UserError`, or the one that the constructor raised."""
    seen: BaseException = error
    while seen.__cause__ is not None and not isinstance(seen, UserError):
        seen = seen.__cause__
    return seen
