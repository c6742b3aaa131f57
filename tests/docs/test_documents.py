"""The Python of the pages on documents and conversations, run."""

from pathlib import Path

import pytest
from documents import DOCS
from pages import follow


@pytest.mark.parametrize("page", ["documents", "conversations"])
def test_the_python_of_a_page_holds(page: str, tmp_path: Path) -> None:
    follow(DOCS / f"train/{page}.md", tmp_path, skip="mhc_lightning")
