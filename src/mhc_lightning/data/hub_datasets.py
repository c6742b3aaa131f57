"""Hugging Face datasets as input: rows as documents, for `hf://NAME[/CONFIG][:SPLIT]`.

A name with an owner has one slash (`hf://owner/name`); a third part is the configuration. A local
folder of data files works too (`hf:///path/to/folder`), whatever `datasets` can load.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_lightning.data.documents import (
    Document,
    ReadingLog,
    ReadingOptions,
    record_documents,
)
from mhc_lightning.data.record_text import RecordText, field_names
from mhc_lightning.errors import UserError

PREFIX = "hf://"
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class HubDataset:
    """An opened dataset.

    Attributes:
        url: The input as it was given.
        rows: A `datasets.Dataset`: has a length, and slices are dictionaries of lists.
    """

    url: str
    rows: Any

    @property
    def identity(self) -> list[Any]:
        """A value that changes when the rows change."""
        return [self.url, len(self.rows), str(getattr(self.rows, "_fingerprint", ""))]


@dataclass(frozen=True)
class HubUnit:
    """A `WorkUnit` of the rows [start, stop)."""

    dataset: HubDataset
    start: int
    stop: int
    input_size: int

    def documents(self, reading: ReadingOptions, log: ReadingLog) -> Iterator[Document]:
        """See `WorkUnit`."""
        yield from record_documents(
            enumerate(_records(self.dataset, self.start, self.stop, reading.text), self.start + 1),
            lambda number: f"row {number} of {self.dataset.url}",
            reading,
            log.skipped,
        )


def open_dataset(url: str) -> HubDataset:
    """Load a dataset by its URL.

    Raises:
        UserError: The library `datasets` is not installed, or cannot load the dataset.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"input {url} needs the datasets library;"
            " install it with `pip install 'mhc-lightning[datasets]'`"
        ) from error
    name, configuration, split = _parse(url)
    try:
        rows = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # from OSError to the errors of the hub's client
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"input {url} cannot be loaded: {reason[0]}") from error
    return HubDataset(url, rows)


def plan_rows(dataset: HubDataset, unit_bytes: int, text: RecordText) -> list[HubUnit]:
    """Divide the rows into units of about `unit_bytes`, judged by the first rows' texts.

    Raises:
        UserError: The dataset has not the column of the text.
    """
    total = len(dataset.rows)
    sample = [
        sum(len(str(value)) for value in record.values())
        for record in _records(dataset, 0, min(total, _ROWS_AT_ONCE), text)
    ]
    mean = max(1, sum(sample) // max(1, len(sample)))
    rows = max(1, unit_bytes // mean)
    return [
        HubUnit(dataset, start, stop, (stop - start) * mean)
        for start in range(0, total, rows)
        for stop in [min(total, start + rows)]
    ]


def _parse(url: str) -> tuple[str, str | None, str]:
    name, _, split = url.removeprefix(PREFIX).partition(":")
    if Path(name).is_dir():
        return name, None, split or "train"
    parts = name.strip("/").split("/")
    configuration = "/".join(parts[2:]) or None
    return "/".join(parts[:2]), configuration, split or "train"


def _records(
    dataset: HubDataset, start: int, stop: int, text: RecordText
) -> Iterator[dict[str, Any]]:
    """The rows [start, stop), with the columns that hold the text."""
    for first in range(start, stop, _ROWS_AT_ONCE):
        columns = dataset.rows[first : min(first + _ROWS_AT_ONCE, stop)]
        missing = text.missing(columns)
        if missing:
            raise UserError(
                f"{dataset.url} has no column {missing!r} but {field_names(columns)};"
                f" {text.remedy(columns)}"
            )
        names = [name for name in columns if text.reads(name)]
        for values in zip(*(columns[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))
