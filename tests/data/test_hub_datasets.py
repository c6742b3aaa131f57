"""Rows of a Hugging Face dataset as documents."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mhc_lightning.data import PreparedData, prepare
from mhc_lightning.data.hub_datasets import open_dataset, plan_rows
from mhc_lightning.data.record_text import RecordText
from mhc_lightning.errors import UserError


class Rows:
    """Behaves like `datasets.Dataset` where it is used."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns
        self._fingerprint = str(hash(str(columns)))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: slice) -> dict[str, list[Any]]:
        return {name: values[rows] for name, values in self.columns.items()}


TEXTS = [f"row {number} é" * 30 for number in range(150)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """A `datasets` library that knows two data sets, and what it was asked for."""
    calls = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> Rows:
        calls.append((name, configuration, split))
        if name == "absent":
            raise ConnectionError("Couldn't reach the hub\nand a long story")
        if name == "numbers":
            return Rows(text=[1, 2])
        return Rows(text=[*TEXTS, None, ""], id=list(range(152)))

    library = ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    return calls


def test_urls_name_data_set_configuration_and_split(asked: list[Any], tmp_path: Path) -> None:
    for url in ("hf://wiki", "hf://owner/wiki:test", "hf://owner/wiki/en/2024:train[:10%]"):
        open_dataset(url)
    open_dataset(f"hf://{tmp_path}:train")
    assert asked == [
        ("wiki", None, "train"),
        ("owner/wiki", None, "test"),
        ("owner/wiki", "en/2024", "train[:10%]"),
        (str(tmp_path), None, "train"),
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_become_documents(asked: list[Any], tmp_path: Path, workers: int) -> None:
    summary = prepare(
        "hf://owner/wiki",
        tmp_path / "out",
        chunk_bytes=5000,
        validation_fraction=0.2,
        num_workers=workers,
        progress=False,
    )
    prepared = PreparedData(tmp_path / "out")
    found = [text for split in ("train", "validation") for text in prepared.documents(split)]
    assert sorted(found) == sorted(text.encode() for text in TEXTS)
    assert summary.record.skipped.empty_documents == 2
    assert len(prepared.chunks("train")) > 3


def test_files_and_data_sets_together(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a file\n" * 50)
    summary = prepare([tmp_path / "a.txt", "hf://wiki"], tmp_path / "out", progress=False)
    assert summary.total.bytes == 350 + sum(len(text.encode()) for text in TEXTS)


def test_rows_are_divided_whatever_their_number(asked: list[Any]) -> None:
    dataset = open_dataset("hf://wiki")
    for unit_bytes in (1, 1000, 10**9):
        units = plan_rows(dataset, unit_bytes, RecordText())
        rows = [row for unit in units for row in range(unit.start, unit.stop)]
        assert rows == list(range(152))


def test_mistakes_are_one_line(asked: list[Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hf://absent cannot be loaded: Couldn't reach the hub$"):
        prepare("hf://absent", tmp_path / "out")
    with pytest.raises(UserError, match="no column 'body' but 'text', 'id'"):
        prepare("hf://wiki", tmp_path / "out", text_field="body")
    with pytest.raises(UserError, match="is int, not text"):
        prepare("hf://numbers", tmp_path / "out")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'mhc-lightning\[datasets\]'"):
        prepare("hf://wiki", tmp_path / "out")
