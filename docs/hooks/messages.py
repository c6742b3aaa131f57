"""The error messages of the package, read from its source: what a user can meet, and where.

A message is what a call such as `UserError(...)` is given. Parts that are known only when it is
raised stand in angle brackets.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "mhc_lightning"
_BASES = ("UserError", "RunFaultError", "NonFiniteLossError")


@dataclass(frozen=True)
class Message:
    """One place that makes an error.

    Attributes:
        file: The source file, relative to the package.
        line: Its line there.
        error: The error's class.
        text: The message, with its variable parts in angle brackets; only those if it is made
            elsewhere.
    """

    file: str
    line: int
    error: str
    text: str

    @property
    def is_readable(self) -> bool:
        """Whether the text has words of its own, and is not all variable."""
        words = without_labels(self.text)
        return sum(character.isalpha() for character in words) >= 8


@cache
def messages(package: Path = PACKAGE) -> list[Message]:
    """Every place in the package that makes an error for a user, by file and line."""
    sources = {
        file.relative_to(package).as_posix(): file.read_text(encoding="utf-8")
        for file in sorted(package.rglob("*.py"))
    }
    trees = {file: ast.parse(text) for file, text in sources.items() if "Error" in text}
    errors = _error_classes(trees.values())
    found = [found for file, tree in trees.items() for found in _in_file(file, tree, errors)]
    return sorted(found, key=lambda message: (message.file, message.line))


def _error_classes(trees: Iterable[ast.Module]) -> set[str]:
    """The errors for users, and the classes that are derived from them."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    errors = set(_BASES)
    while more := {name for name, above in bases.items() if above & errors} - errors:
        errors |= more
    return errors


def _in_file(file: str, tree: ast.Module, errors: set[str]) -> Iterator[Message]:
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
            continue
        own = list(_own_nodes(scope))
        assigned = _assigned_texts(own)
        for node in own:
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id in errors and node.args:
                text = _text(node.args[0], assigned)
                yield Message(file, node.lineno, node.func.id, " ".join(text.split()))


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of the functions in it."""
    waiting = [scope]
    while waiting:
        for child in ast.iter_child_nodes(waiting.pop()):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
                waiting.append(child)


def _assigned_texts(nodes: list[ast.AST]) -> dict[str, ast.expr]:
    """Local names that are given a text once."""
    assigned: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Name):
                assigned.setdefault(target.id, []).append(node.value)
    texts = (ast.Constant, ast.JoinedStr, ast.BinOp, ast.IfExp)
    return {
        name: values[0]
        for name, values in assigned.items()
        if len(values) == 1 and isinstance(values[0], texts)
    }


def _text(node: ast.expr, assigned: dict[str, ast.expr]) -> str:
    """The text of an expression, with what is variable in angle brackets."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value, assigned) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, assigned)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, assigned) + _text(node.right, assigned)
    if isinstance(node, ast.IfExp):
        sides = [_text(side, assigned) for side in (node.body, node.orelse)]
        if all(without_labels(side).strip("⟨⟩") or not side for side in sides):
            return f"⟨{' | '.join(side.strip() or '–' for side in sides)}⟩"
    if isinstance(node, ast.Name) and node.id in assigned:
        return _text(assigned[node.id], {})
    return f"⟨{_label(node)}⟩"


def _label(node: ast.expr) -> str:
    """A short name for a part that is known only when the message is made."""
    if isinstance(node, ast.Name):
        return node.id.strip("_").replace("_", " ")
    if isinstance(node, ast.Attribute):
        owner = _label(node.value)
        name = node.attr.strip("_").replace("_", " ")
        return name if owner in ("self", "…") else f"{owner} {name}"
    if isinstance(node, ast.BoolOp):
        return _label(node.values[0])
    if isinstance(node, ast.Subscript):
        return _label(node.value)
    if isinstance(node, ast.Call) and node.args:
        return _label(node.args[-1])
    if isinstance(node, ast.Call):
        return _label(node.func)
    return "…"


def without_labels(text: str) -> str:
    """A message with ⟨⟩ for each part that varies."""
    depth, outside = 0, []
    for character in text:
        depth -= character == "⟩"
        if depth == 0:
            outside.append(character)
        depth += character == "⟨"
    return "".join(outside)
