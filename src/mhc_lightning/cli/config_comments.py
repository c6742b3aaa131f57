"""The comments of configuration files: the meaning of each key, for `--help` and the docs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class CommentedKey:
    """A key of a configuration file.

    Attributes:
        key: Dotted, from the top of the file.
        value: As YAML reads it; a mapping for a section.
        comment: Beside the key, or in the lines above it; empty if there is none.
    """

    key: str
    value: Any
    comment: str


def file_comment(file: Path) -> str:
    """The comment that a file begins with, in one line and without Hydra's `@package`."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def commented_keys(file: Path) -> list[CommentedKey]:
    """All keys of a file but `defaults`, in order, each section before its members."""
    text = file.read_text(encoding="utf-8")
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return []
    return list(_keys(root, yaml.safe_load(text), "", text.splitlines()))


def _keys(
    node: yaml.MappingNode, values: dict[str, Any], prefix: str, lines: list[str]
) -> Iterator[CommentedKey]:
    for key_node, value_node in node.value:
        name = key_node.value
        if name == "defaults" and not prefix:
            continue
        is_section = isinstance(value_node, yaml.MappingNode) and not value_node.flow_style
        end = key_node.end_mark if is_section else value_node.end_mark
        beside = lines[end.line][end.column :].partition("#")[2].strip()
        comment = beside or _above(lines, key_node.start_mark.line)
        yield CommentedKey(f"{prefix}{name}", values[name], comment)
        if is_section:
            yield from _keys(value_node, values[name], f"{prefix}{name}.", lines)


def _above(lines: list[str], line: int) -> str:
    """The comment lines right above a line, unless the file begins with them."""
    first = line
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return " ".join(text.lstrip("# ").rstrip() for text in lines[first:line]) if first else ""
