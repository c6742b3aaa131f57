"""Reading of single files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mhc_lightning.data.documents import Document, ReadingLog, ReadingOptions
from mhc_lightning.data.input_files import find_input_files
from mhc_lightning.data.record_text import RecordText
from mhc_lightning.data.work_units import plan_units

Read = Callable[..., tuple[list[bytes], ReadingLog]]


@pytest.fixture
def read() -> Read:
    """Documents of a file or folder, and what was left out; options as of `ReadingOptions`."""

    def read_file(path: Path, unit_bytes: int = 10**6, **options: Any) -> Any:
        reading, log = ReadingOptions(**options), ReadingLog()
        files = find_input_files([path], text=reading.text, as_text=reading.as_text)
        units = plan_units(files, unit_bytes, reading)
        found: list[Document] = [
            document for unit in units for document in unit.documents(reading, log)
        ]
        return [document.data for document in found], log

    return read_file


@pytest.fixture
def text() -> Callable[..., RecordText]:
    return RecordText
