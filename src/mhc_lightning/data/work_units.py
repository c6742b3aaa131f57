"""The input divided into work units, each of which one worker process tokenizes.

The division depends on the input alone. Each unit becomes chunk files of its own, so the output is
the same for any number of workers, and a finished unit need not be repeated. Large files are cut
where their format allows it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mhc_lightning.data.archive_parts import archive_parts
from mhc_lightning.data.documents import Document, ReadingLog, ReadingOptions
from mhc_lightning.data.file_formats import (
    ARCHIVES,
    CSV,
    JSON_ARRAY,
    MARKED_TEXT,
    PLAIN_TEXT,
    TABLES,
    TSV,
    WARC,
)
from mhc_lightning.data.table_parts import table_parts
from mhc_lightning.data.text_files import TextFile
from mhc_lightning.data.text_parts import WholeFile, text_parts

# With fewer held-out files than this, a split by whole files would depend on chance. Then the end
# of each file is held out instead.
_FEWEST_HELD_OUT_FILES = 10


class Part(Protocol):
    """A file or a part of one."""

    @property
    def file(self) -> TextFile:
        """The file."""

    @property
    def size(self) -> int:
        """Bytes of text, roughly."""

    @property
    def input_size(self) -> int:
        """See `WorkUnit`."""

    def documents(self, reading: ReadingOptions, log: ReadingLog) -> Iterator[Document]:
        """See `WorkUnit`."""


class WorkUnit(Protocol):
    """Input that one worker turns into chunks."""

    @property
    def input_size(self) -> int:
        """Bytes of input, for the progress bar."""

    def documents(self, reading: ReadingOptions, log: ReadingLog) -> Iterator[Document]:
        """The documents of the unit, in order; what is found and left out goes into `log`.

        Raises:
            UserError: The input cannot be read, or a document is not text.
        """


@dataclass(frozen=True)
class FileUnit:
    """A `WorkUnit` of files and parts of files."""

    parts: tuple[Part, ...]

    @property
    def input_size(self) -> int:
        """See `WorkUnit`."""
        return sum(part.input_size for part in self.parts)

    def documents(self, reading: ReadingOptions, log: ReadingLog) -> Iterator[Document]:
        """See `WorkUnit`."""
        for part in self.parts:
            yield from part.documents(reading, log)


def plan_units(
    files: Sequence[TextFile], unit_bytes: int, reading: ReadingOptions
) -> list[FileUnit]:
    """Cut and pack files into units of about `unit_bytes` of text, in the order of the files.

    Raises:
        UserError: A table or an archive cannot be opened, or has not the text that is asked for.
    """
    share = reading.validation_fraction
    plain = sum(file.format in (PLAIN_TEXT, MARKED_TEXT) for file in files)
    by_end = plain * share < _FEWEST_HELD_OUT_FILES and share > 0
    units: list[FileUnit] = []
    unit: list[Part] = []
    size = 0
    for file in files:
        for part in _parts(file, unit_bytes, share if by_end else 0.0, reading):
            if unit and size + part.size > unit_bytes:
                units.append(FileUnit(tuple(unit)))
                unit, size = [], 0
            unit.append(part)
            size += part.size
    if unit:
        units.append(FileUnit(tuple(unit)))
    return units


def _parts(
    file: TextFile, unit_bytes: int, held_out_end: float, reading: ReadingOptions
) -> Iterator[Part]:
    """The parts of one file; `held_out_end` is the share of a plain-text file to hold out."""
    if file.format in TABLES:
        yield from table_parts(file, unit_bytes, reading)
    elif file.format in ARCHIVES:
        yield from archive_parts(file, unit_bytes)
    elif file.format in (JSON_ARRAY, CSV, TSV, WARC):
        yield WholeFile(file)
    else:
        yield from text_parts(file, unit_bytes, held_out_end, reading.cuts)
