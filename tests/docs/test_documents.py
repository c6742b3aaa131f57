"""The Python of the page on documents, run."""

from pathlib import Path

from documents import DOCS
from pages import follow


def test_packed_documents_of_the_page_are_as_alone(tmp_path: Path) -> None:
    follow(DOCS / "train/documents.md", tmp_path, skip="mhc_lightning")
