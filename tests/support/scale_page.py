"""The tables of docs/train/scale.md, which tests compute."""

import os
import re

from documents import DOCS

PAGE = DOCS / "train/scale.md"


def check_or_write(name: str, table: str) -> None:
    """Compare a table with the one behind its mark on the page; write it with WRITE_DOCS=1."""
    page = PAGE.read_text(encoding="utf-8")
    mark = re.compile(rf"(<!-- written: {name} -->\n\n).*?(?=\n\n)", re.S)
    assert mark.search(page), name
    written = mark.sub(lambda found: found[1] + table, page)
    if os.environ.get("WRITE_DOCS"):
        PAGE.write_text(written, encoding="utf-8")
        return
    assert written == page, f"{name}: WRITE_DOCS=1 pytest tests/planning"


def row_of(name: str, first: str) -> str:
    """The row of a table that begins with some cells."""
    page = PAGE.read_text(encoding="utf-8")
    table = page.split(f"<!-- written: {name} -->")[1].split("\n\n")[1]
    (row,) = (line for line in table.splitlines() if line.startswith(first))
    return row
