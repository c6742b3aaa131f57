"""Composes an experiment: files, groups and overrides become one checked configuration."""

import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.config_comments import commented_keys
from mhc_lightning.cli.experiments import find_experiment, group_choices, shipped_folder
from mhc_lightning.cli.overrides import (
    flat,
    full_key,
    key_of,
    split_by_group,
    with_known_key,
    with_readable_value,
)
from mhc_lightning.cli.run_folder import is_first_process
from mhc_lightning.cli.value_types import check_overridden_values
from mhc_lightning.errors import UserError

_NONE = ("", "null", "None")  # of ckpt_path
_MISSING = "???"  # what OmegaConf takes for a value still to be given
_RECORDED_AS_TYPED = ("${output_dir}", "${train}")
_RUN_KEYS = ("seed", "output_dir", "overwrite", "ckpt_path", "compile", "recompute")


class _ShippedGroups(SearchPathPlugin):
    """Makes the shipped groups known to experiments in any folder, after that folder's groups."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("mhc_lightning", f"file://{shipped_folder()}")


@dataclass(frozen=True)
class Experiment:
    """A composed experiment.

    Attributes:
        file: The experiment's file.
        config: Everything, with interpolations still in place.
        literal: The texts typed for literal keys.
        overridden: Dotted keys set on the command line.
        defaults: Files that were merged, in order: (path, dotted key they are merged at).
    """

    file: Path
    config: DictConfig
    literal: dict[str, list[str]]
    overridden: set[str] = field(default_factory=set)
    defaults: list[tuple[Path, str]] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """Everything as plain values: interpolations resolved, literals as they were typed."""
        values = OmegaConf.to_container(self.config, resolve=True, throw_on_missing=True)
        assert isinstance(values, dict)
        for key in self.literal:
            *sections, name = key.split(".")
            place: Any = values
            for section in sections:
                place = place[section]
            place[name] = self.literal_value(key)
        return {str(key): value for key, value in values.items()}

    def record(self) -> dict[str, Any]:
        """The configuration to write down: resolved, and an experiment with the same values.

        Values that begin with `${output_dir}` or `${train}` stay interpolations, so that the record
        can be run with another `output_dir` or `train`.
        """
        raw = OmegaConf.to_container(self.config, resolve=False)
        record = _kept(raw, escaped_tree(self.values()))
        assert isinstance(record, dict)
        return record

    def literal_value(self, key: str) -> str | list[str] | None:
        """The text typed for a literal key: a list for `input`, else the last one."""
        typed = self.literal[key]
        if key == "input":
            return typed
        return None if key == "ckpt_path" and typed[-1] in _NONE else typed[-1]


def compose_experiment(arguments: Arguments) -> Experiment:
    """Find, compose and check what a command line asks for.

    Raises:
        UserError: anything that cannot be composed, in one line that names the key or the file.
    """
    assert arguments.config is not None and arguments.command is not None
    file = find_experiment(arguments.config)
    groups = group_choices([file.parent, shipped_folder()])
    choices, settings = split_by_group(arguments.overrides, groups)
    try:
        with initialize_config_dir(str(file.parent), version_base="1.3", job_name="mhc_lightning"):
            plain = compose(config_name=file.stem, overrides=choices)
            keys = set(dotted_keys(OmegaConf.to_container(plain, resolve=False)))
            section = arguments.command.section
            settings = [with_known_key(word, keys, groups, section) for word in settings]
            settings = [with_readable_value(word, plain) for word in settings]
            overrides = choices + settings
            config = compose(config_name=file.stem, overrides=overrides)
            check_overridden_values(plain, config, [key_of(word) for word in settings])
            literal = {
                full_key(key, keys, section): values for key, values in arguments.literal.items()
            }
            experiment = Experiment(
                file=file,
                config=config,
                literal=literal,
                overridden={key_of(word) for word in settings} | set(literal),
                defaults=_merged_files(file, overrides),
            )
            _place_literals(experiment)
            _require_values(experiment)
            _require(_RUN_KEYS, experiment)
            _check_seed(experiment.values()["seed"])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error, file)) from error
    except YAMLError as error:
        raise UserError(f"config {file.name} is not valid YAML: {flat(str(error))}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"config {file.name}, or one that it names, is not text in UTF-8 ({error.reason} at"
            f" byte {error.start}); save it as UTF-8"
        ) from error
    except RecursionError as error:
        raise UserError(f"config {file.name} names itself under `defaults:`") from error
    _warn_of_unread_keys(file, plain, groups)
    return experiment


def dotted_keys(node: Any, prefix: str = "") -> Iterable[str]:
    """Every key of nested mappings, the inner nodes too, as `a.b.c`."""
    return (key for key, _ in _dotted_items(node, prefix))


def _dotted_items(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Every key of nested mappings, as `dotted_keys`, and its value."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}", value
            yield from _dotted_items(value, f"{prefix}{key}.")


def _warn_of_unread_keys(file: Path, plain: DictConfig, groups: Iterable[str]) -> None:
    """Warn of keys at the top of a file that look like others and that nothing reads.

    Further keys are free: values of interpolations, or notes.
    """
    run = OmegaConf.load(shipped_folder() / "run" / "default.yaml")
    known = {*map(str, run), *groups}
    keys = dotted_keys(OmegaConf.to_container(plain))
    inner = {key.rpartition(".")[2]: key for key in keys if "." in key}
    text = file.read_text(encoding="utf-8")
    for key in map(str, plain):
        if key in known or re.search(rf"\$\{{[^}}]*\b{re.escape(key)}\b", text):
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        meant = near[0] if near else inner.get(key, key)
        if meant != key and is_first_process():
            print(
                f"warning: config {file.name}: nothing reads {key!r}; did you mean {meant!r}?",
                file=sys.stderr,
            )


def _place_literals(experiment: Experiment) -> None:
    """Put what was typed where interpolations such as `${output_dir}` find it."""
    with open_dict(experiment.config):
        for key in experiment.literal:
            value = _placeable(experiment.literal_value(key))
            OmegaConf.update(experiment.config, key, value, merge=False, force_add=True)


def _placeable(value: Any) -> Any:
    if isinstance(value, list):
        return [_placeable(item) for item in value]
    return "" if value == _MISSING else escaped_tree(value)


def escaped(text: str) -> str:
    """`text` with OmegaConf's interpolations taken out of force: it gives back these characters."""
    return re.sub(r"(\\*)\$\{", lambda match: match.group(1) * 2 + r"\${", text)


def escaped_tree(value: Any) -> Any:
    """`escaped` for every text in nested lists and mappings."""
    if isinstance(value, dict):
        return {key: escaped_tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped_tree(item) for item in value]
    return escaped(value) if isinstance(value, str) else value


def _kept(raw: Any, escaped: Any) -> Any:
    if isinstance(escaped, dict) and isinstance(raw, dict):
        return {key: _kept(raw[key], item) for key, item in escaped.items()}
    return raw if isinstance(raw, str) and raw.startswith(_RECORDED_AS_TYPED) else escaped


def _require(keys: Iterable[str], experiment: Experiment) -> None:
    for key in keys:
        if key not in experiment.config:
            raise UserError(
                f"config {experiment.file.name} has no `{key}`; begin its `defaults:` with"
                " `- run: default`, as the shipped experiments do"
            )


def _require_values(experiment: Experiment) -> None:
    """Refuse a configuration in which a value is still to be given; says what it is."""
    raw = OmegaConf.to_container(experiment.config, resolve=False)
    key = next((key for key, value in _dotted_items(raw) if value == _MISSING), None)
    if key is None:
        return
    comments = [
        entry.comment
        for path, package in experiment.defaults
        for entry in commented_keys(path)
        if key in (entry.key, f"{package}.{entry.key}") and entry.comment
    ]
    what = f": {comments[0]}" if comments else ""
    raise UserError(f"config {experiment.file.stem} needs {key}=…{what}")


def _check_seed(seed: Any) -> None:
    """Refuse a seed that numpy's generators, which Lightning seeds too, do not take."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        shown = "null" if seed is None else repr(seed)
        raise UserError(f"seed must be a whole number, at least 0 and below 2**32, not {shown}")


def _merged_files(file: Path, overrides: list[str]) -> list[tuple[Path, str]]:
    loader = GlobalHydra.instance().config_loader()
    from hydra.types import RunMode

    found = []
    defaults = loader.compute_defaults_list(file.stem, overrides, RunMode.RUN)
    for default in defaults.defaults:
        path = default.config_path or ""
        if path.startswith("hydra"):
            continue
        for folder in (file.parent, shipped_folder()):
            if (folder / f"{path}.yaml").is_file():
                found.append((folder / f"{path}.yaml", default.package or ""))
                break
    return found


def _one_line(error: Exception, file: Path) -> str:
    """The message of an error of Hydra or OmegaConf, in one line."""
    message = str(error)
    group = re.match(r"Could not override '(\w+)'\. No match in the defaults list", message)
    if group:
        name = group.group(1)
        return f"config {file.stem} has no {name} to choose; leave out {name}=…"
    return f"config {file.name}: {flat(message)}"


Plugins.instance().register(_ShippedGroups)
