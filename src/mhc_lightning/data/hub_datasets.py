"""Hugging Face datasets as input: rows as documents, for `hf://NAME[/CONFIG][:SPLIT]`.

A name with an owner has one slash (`hf://owner/name`); a third part is the configuration. A local
folder of data files works too (`hf:///path/to/folder`), whatever `datasets` can load.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_lightning.data.documents import Document, Skipped, is_held_out, text_bytes
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

    def documents(
        self, text_field: str, validation_fraction: float, skipped: Skipped
    ) -> Iterator[Document]:
        """See `WorkUnit`."""
        for start in range(self.start, self.stop, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, self.stop)
            for text in _texts(self.dataset, start, stop, text_field):
                data = text_bytes(text)
                if data:
                    yield Document(data, is_held_out(data, validation_fraction))
                else:
                    skipped.empty_documents += 1


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


def plan_rows(dataset: HubDataset, unit_bytes: int, text_field: str) -> list[HubUnit]:
    """Divide the rows into units of about `unit_bytes`, judged by the first rows' texts."""
    total = len(dataset.rows)
    sample = [len(text) for text in _texts(dataset, 0, min(total, _ROWS_AT_ONCE), text_field)]
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


def _texts(dataset: HubDataset, start: int, stop: int, text_field: str) -> list[str]:
    columns = dataset.rows[start:stop]
    if text_field not in columns:
        names = ", ".join(map(repr, columns))
        raise UserError(
            f"{dataset.url} has no column {text_field!r} but {names}; name one with text_field=…"
        )
    texts = ["" if text is None else text for text in columns[text_field]]
    for text in texts:
        if not isinstance(text, str):
            raise UserError(
                f"column {text_field!r} of {dataset.url} is {type(text).__name__}, not text;"
                " name another with text_field=…"
            )
    return texts
