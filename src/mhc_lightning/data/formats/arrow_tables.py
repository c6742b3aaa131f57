"""Rows of Parquet and Arrow files, a batch of rows at a time, by pyarrow."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any, BinaryIO

from mhc_lightning.data.record_text import BadRecord, RecordText, field_names
from mhc_lightning.errors import UserError

_ROWS_AT_ONCE = 64
_BUFFER_BYTES = 1 << 20


class Table:
    """A Parquet or Arrow file, opened.

    Attributes:
        group_bytes: Bytes of the wanted columns in each group of rows (a row group, a record
            batch). A stream of Arrow has one group, as it cannot be entered in the middle.

    Args:
        raw: The file; it has to be seekable, unless it is a stream of Arrow.
        kind: `Parquet`, `Arrow` or `Arrow stream`.
        size: Bytes of the file.
        text: The text of a row.
        name: Name of the file, for error messages.

    Raises:
        UserError: pyarrow is not installed, the file is damaged or cut short, or it has no such
            column.
    """

    def __init__(self, raw: BinaryIO, kind: str, size: int, text: RecordText, name: str) -> None:
        self._kind = kind
        self._name = name
        self._arrow = _pyarrow(name, kind)
        try:
            if kind == "Parquet":
                self._open_parquet(raw, text)
            elif kind == "Arrow":
                self._open_arrow(raw, size, text)
            else:
                self._open_stream(raw, size, text)
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from error

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, object]]:
        """The rows of the groups [start, stop), numbered from 1.

        A row whose text is not UTF-8 is a `BadRecord`.

        Raises:
            UserError: The file is damaged.
        """
        number = 0
        batches = self._batches(start, stop)
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                values = _values(batch)
            except (self._arrow.ArrowException, OSError, ValueError) as error:
                raise self._damaged(error) from error
            for value in values:
                number += 1
                yield number, value

    def rows_before(self, group: int) -> int:
        """Number of rows in the groups before one."""
        if self._kind == "Parquet":
            return sum(self._file.metadata.row_group(i).num_rows for i in range(group))
        return sum(self._file.get_batch(i).num_rows for i in range(group))

    def _open_parquet(self, raw: BinaryIO, text: RecordText) -> None:
        import pyarrow.parquet

        # A column is read page by page, as it is needed.
        self._file = pyarrow.parquet.ParquetFile(raw, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        schema = self._file.schema_arrow
        self._check_columns(schema.names, text)
        self._columns = list(text.fields)
        groups = [self._file.metadata.row_group(i) for i in range(self._file.num_row_groups)]
        wanted = {
            index
            for index in range(len(self._file.schema))
            if _is_wanted(self._file.schema.column(index).path, text)
        }
        self.group_bytes = [
            sum(group.column(index).total_uncompressed_size for index in wanted) for group in groups
        ]

    def _open_arrow(self, raw: BinaryIO, size: int, text: RecordText) -> None:
        raw.seek(0)
        names = self._arrow.ipc.open_file(raw).schema.names
        self._check_columns(names, text)
        options = self._arrow.ipc.IpcReadOptions(
            included_fields=[i for i, name in enumerate(names) if text.reads(name)],
            use_threads=False,
        )
        raw.seek(0)
        self._file = self._arrow.ipc.open_file(raw, options=options)
        count = self._file.num_record_batches
        self.group_bytes = [size // max(1, count)] * count

    def _open_stream(self, raw: BinaryIO, size: int, text: RecordText) -> None:
        self._file = self._arrow.ipc.open_stream(raw)
        self._check_columns(self._file.schema.names, text)
        self._columns = [name for name in self._file.schema.names if text.reads(name)]
        self.group_bytes = [size]

    def _check_columns(self, names: list[str], text: RecordText) -> None:
        missing = text.missing(names)
        if missing:
            raise UserError(
                f"input {self._name} has no column {missing!r} but {field_names(names)};"
                f" {text.remedy(names)}"
            )

    def _batches(self, start: int, stop: int) -> Iterator[Any]:
        """Batches of rows."""
        if self._kind == "Parquet":
            yield from self._file.iter_batches(
                _ROWS_AT_ONCE, list(range(start, stop)), self._columns, use_threads=False
            )
            return
        if self._kind == "Arrow":
            batches = (self._file.get_batch(index) for index in range(start, stop))
        else:
            batches = (batch.select(self._columns) for batch in self._file)
        for batch in batches:
            batch.validate(full=True)  # wrong offsets would read memory that is not the batch's
            for row in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield batch.slice(row, _ROWS_AT_ONCE)

    def _damaged(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())
        return UserError(
            f"input {self._name} is a damaged {self._kind} file ({reason}); repair it or leave it"
            " out"
        )


def _values(batch: Any) -> list[object]:
    """The rows of a batch as dictionaries."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return [_value(batch, row) for row in range(batch.num_rows)]


def _value(batch: Any, row: int) -> object:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRecord(f"is not UTF-8 ({error.reason})")


def _is_wanted(path: str, text: RecordText) -> bool:
    return any(path == field or path.startswith(f"{field}.") for field in text.fields)


def _pyarrow(name: str, kind: str) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise UserError(
            f'input {name} is {kind}; to read it, `pip install "mhc-lightning[formats]"`'
        ) from error
    return pyarrow
