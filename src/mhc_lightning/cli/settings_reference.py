"""Every configuration key that is shipped, with its type, default, meaning and file."""

import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra.utils
import yaml

from mhc_lightning.cli.arguments import LITERAL_KEYS
from mhc_lightning.cli.config_comments import CommentedKey, commented_keys, file_comment
from mhc_lightning.cli.experiments import shipped_folder
from mhc_lightning.cli.value_types import describe_type

# In the order of an experiment's `defaults`.
GROUPS = (
    *("run", "model", "connection", "memory", "data", "optimizer", "trainer", "strategy"),
    *("callbacks", "logger", "checkpoint"),
)
# What the sections of run/default.yaml are the arguments of; several where one takes a part.
_SECTION_TARGETS = {
    "prepare": ("mhc_lightning.data.prepare",),
    "export": ("mhc_lightning.interchange.export_model",),
    "generate": ("mhc_lightning.generation.generate",),
    "evaluate": (
        "mhc_lightning.evaluation.harness_model.HarnessModel",
        "mhc_lightning.evaluation.harness_tasks.run_tasks",
    ),
}
# Keys that no signature and no default tells the type of.
_TYPES = {
    "recompute": "off, auto or a whole number",
    "input": "text, given once or several times",
    "data.path": "text or a list",
    "evaluate.tasks": "text or a list",
    "trainer.devices": "a whole number, a list or text",
    "trainer.precision": "text",
    "trainer.limit_val_batches": "a whole number or a number",
    "trainer.gradient_clip_val": "a number or null",
    "trainer.val_check_interval": "a whole number",
    "trainer.deterministic": "true, false or warn",
    "checkpoint.sharded": "true, false or auto",
    "model.connection": "a class with its arguments",
    "model.memory": "a class with its arguments",
    "data.storage_options": "a mapping or null",
    "prepare.storage_options": "a mapping or null",
    "trainer.accelerator": "text",
    "trainer.profiler": "text",
}


@dataclass(frozen=True)
class Setting:
    """A configuration key in one of the files that a group offers.

    Attributes:
        key: Dotted, as on the command line: `optimizer.lr`.
        type: In words: `a whole number or null`; `class` for a `_target_`.
        default: The value in the file, as YAML; `???` where an experiment has to give one.
        meaning: One phrase or sentence.
        file: Where it is set, relative to the configurations: `optimizer/adamw.yaml`.
    """

    key: str
    type: str
    default: str
    meaning: str
    file: str


def settings() -> list[Setting]:
    """Every key of every group's files, in the groups' order; the files of experiments set these.

    Imports what the files name as `_target_`, torch and Lightning included.
    """
    files = (file for group in GROUPS for file in _files(group))
    return [setting for file in files for setting in settings_in(file)]


def settings_in(file: Path) -> Iterator[Setting]:
    """The settings of one file of a group."""
    group = file.parent.name
    name = file.relative_to(shipped_folder()).as_posix()
    keys = commented_keys(file)
    targets = _targets(group, file, keys)
    for entry in keys:
        section, _, last = entry.key.rpartition(".")
        key = entry.key if group == "run" else f"{group}.{entry.key}"
        takers = targets.get(section, [])
        if last == "_target_":
            about = inspect.getdoc(takers[0]) or file_comment(file)
            meaning = " ".join(about.partition("\n\n")[0].split()).removesuffix(".")
            yield Setting(key, "class", str(entry.value), meaning, name)
        if last.startswith("_") or (isinstance(entry.value, dict) and entry.value):
            continue
        yield Setting(
            key=key,
            type=_type(key, last, entry.value, takers),
            default=_as_yaml(entry.value),
            meaning=entry.comment or _inherited(file, entry.key) or _documented(last, takers),
            file=name,
        )


def _files(group: str) -> list[Path]:
    return sorted((shipped_folder() / group).glob("*.yaml"))


def _targets(group: str, file: Path, keys: list[CommentedKey]) -> dict[str, list[Any]]:
    """By section of a file ("" for its top): what takes the section's keys as arguments."""
    if group == "run":
        names = {section: list(targets) for section, targets in _SECTION_TARGETS.items()}
    else:
        names = {
            entry.key.rpartition(".")[0]: [entry.value]
            for parent in (*_parents(file), file)
            for entry in (keys if parent == file else commented_keys(parent))
            if entry.key.rpartition(".")[2] == "_target_"
        }
    if group == "strategy" and file.stem == "pipeline_or_fsdp":  # it becomes one
        names[""] = ["mhc_lightning.strategies.PipelineStrategy"]
    return {key: [hydra.utils.get_object(name) for name in found] for key, found in names.items()}


def _parents(file: Path) -> list[Path]:
    """The files of the same group that a file builds on, first the one it overrides last."""
    defaults = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults", [])
    names = [name for name in defaults if isinstance(name, str) and name != "_self_"]
    return [file.with_name(f"{name}.yaml") for name in names]


def _inherited(file: Path, key: str) -> str:
    comments = (e.comment for parent in _parents(file) for e in commented_keys(parent)
                if e.key == key)  # fmt: skip
    return next(comments, "")


def _type(key: str, name: str, value: Any, targets: list[Any]) -> str:
    words = _TYPES.get(key) or _type_of_argument(name, targets)
    if words is None:
        words = "text" if value is None or key in LITERAL_KEYS else describe_type(type(value))
    return f"{words} or null" if value is None and not words.endswith("null") else words


def _type_of_argument(name: str, targets: list[Any]) -> str | None:
    for target in targets:
        function = target.__init__ if inspect.isclass(target) else target
        if name in inspect.signature(target).parameters:
            hint = typing.get_type_hints(function).get(name)
            if hint is not None:
                return describe_type(hint)
    return None


def _documented(name: str, targets: list[Any]) -> str:
    """What a target's docstring says of an argument under `Args:`."""
    for target in targets:
        text = inspect.getdoc(target) or ""
        found = re.search(rf"^ +{name}: (.*(?:\n {{8,}}.*)*)", text, flags=re.MULTILINE)
        if found:
            return " ".join(found.group(1).split()).removesuffix(".")
    return ""


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
