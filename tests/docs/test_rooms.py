"""CONTRIBUTING's table of rooms is the order in which the package imports itself."""

import ast
import re
from pathlib import Path

from documents import REPOSITORY

PACKAGE = REPOSITORY / "src" / "mhc_lightning"
PRIVATE = {"__init__", "__main__", "_moved", "_torchvision"}  # what a user does not import


def rooms_in_order() -> list[str]:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| room |")[1].split("\n\n")[0]
    cells = re.findall(r"^\| (`.+?`) \|", table, flags=re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([\w./]+)`", cell)]
    return [name.removesuffix("/").removesuffix(".py") for name in names]


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported_by(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mhc_lightning."):
            found.add((node.module or "").split(".")[1])
    return found - PRIVATE


def test_the_table_has_each_room():
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    rooms -= {*PRIVATE, "py.typed", "__pycache__"}
    assert sorted(rooms_in_order()) == sorted(rooms)


def test_no_room_imports_one_that_comes_after_it():
    order = rooms_in_order()
    for file in PACKAGE.rglob("*.py"):
        if (room := room_of(file)) in PRIVATE:
            continue
        later = order[order.index(room) + 1 :]
        assert not rooms_imported_by(file) & set(later), file


def test_the_files_that_contributing_names_exist():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w[\w.]*/[\w./]*)`", text)) - {"site/"}  # built
    folders = (REPOSITORY, REPOSITORY / "src", PACKAGE)
    assert len(named) > 20
    for name in named:
        assert any((folder / name).exists() for folder in folders), name
