"""`--print-config`: the composed configuration, and where each value comes from."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from mhc_lightning.cli.composition import Experiment, dotted_keys, escaped, escaped_tree
from mhc_lightning.cli.experiments import shipped_folder

_COLUMN = 60
COMMAND_LINE = "command line"


def show_config(experiment: Experiment) -> str:
    """YAML with a comment after every value that names its source.

    A source is a file of the experiment (`mhc_quickstart.yaml`), a group's file
    (`optimizer/adamw.yaml`), or the command line; an interpolated value says from what.
    """
    origins = _origins(experiment)
    lines = [f"# {experiment.file}"]
    _show(experiment, experiment.config, "", origins, lines)
    return "\n".join(lines) + "\n"


def _origins(experiment: Experiment) -> dict[str, str]:
    """Dotted key -> the last file that set it."""
    origins: dict[str, str] = {}
    for path, package in experiment.defaults:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            continue
        content.pop("defaults", None)
        prefix = f"{package}." if package and package != "_global_" else ""
        for key in dotted_keys(content, prefix):
            origins[key] = _name(path, experiment)
    for key in experiment.overridden:
        for known in list(origins):
            if known == key or known.startswith(f"{key}."):
                origins[known] = COMMAND_LINE
    return origins


def _name(path: Path, experiment: Experiment) -> str:
    if path == experiment.file:
        return path.name
    for folder in (experiment.file.parent, shipped_folder()):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(path)


def _show(
    experiment: Experiment,
    node: DictConfig,
    prefix: str,
    origins: dict[str, str],
    lines: list[str],
) -> None:
    indent = "  " * prefix.count(".")
    for key in map(str, node):
        name = f"{prefix}{key}"
        raw: Any = node._get_node(key)
        value = node[key]
        source = origins.get(name, COMMAND_LINE)
        literal = name in experiment.literal
        interpolated = OmegaConf.is_interpolation(node, key) and not literal
        if literal:
            value = escaped_tree(experiment.literal_value(name))
        elif interpolated and OmegaConf.is_config(value):
            value = raw._value()
        elif interpolated:
            source = f"{source}: {raw._value()}"
            value = escaped(value) if isinstance(value, str) else value
        elif isinstance(value, DictConfig) and value:
            lines.append(f"{indent}{key}:")
            _show(experiment, value, f"{name}.", origins, lines)
            continue
        elif OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=False)
        elif isinstance(value, str):
            value = escaped(value)
        text = f"{indent}{key}: {_scalar(value)}"
        lines.append(f"{text.ljust(_COLUMN)}  # {source}")


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
