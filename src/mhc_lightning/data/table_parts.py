"""Parts of Parquet and Arrow files: groups of rows."""

from collections.abc import Iterator
from dataclasses import dataclass

from mhc_lightning.data.documents import Document, ReadingLog, ReadingOptions, record_documents
from mhc_lightning.data.formats.arrow_tables import Table
from mhc_lightning.data.text_files import TextFile, open_source


@dataclass(frozen=True)
class TablePart:
    """The groups [start, stop) of the rows of a file.

    Attributes:
        size: Bytes of text, roughly.
        input_size: Bytes on disk, roughly.
    """

    file: TextFile
    start: int
    stop: int
    size: int
    input_size: int

    def documents(self, reading: ReadingOptions, log: ReadingLog) -> Iterator[Document]:
        """See `WorkUnit`."""
        path = self.file.path
        with open_source(self.file, seek=True) as raw:
            table = Table(raw, self.file.format, self.file.size, reading.text, path)
            yield from record_documents(
                table.rows(self.start, self.stop),
                lambda number: f"row {table.rows_before(self.start) + number} of {path}",
                reading,
                log.skipped,
            )


def table_parts(file: TextFile, unit_bytes: int, reading: ReadingOptions) -> Iterator[TablePart]:
    """A file in parts of about `unit_bytes`.

    Raises:
        UserError: The file is damaged, or has not the column of the text.
    """
    with open_source(file, seek=True) as raw:
        sizes = Table(raw, file.format, file.size, reading.text, file.path).group_bytes
    scale = file.size / max(1, sum(sizes))
    start, size = 0, 0
    for group, group_bytes in enumerate(sizes):
        if size and size + group_bytes > unit_bytes:
            yield TablePart(file, start, group, size, int(size * scale))
            start, size = group, 0
        size += group_bytes
    if sizes:
        yield TablePart(file, start, len(sizes), size, int(size * scale))
