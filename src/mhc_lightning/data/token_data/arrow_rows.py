"""A folder that `datasets` wrote (`save_to_disk`), with the column `input_ids`.

Each row is a list of ids. The ids of a record batch lie one after the other in its file, so they
are read there without Arrow, once the index of the file was read.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.token_data.token_file import (
    Context,
    TokenFile,
    sample_documents,
    size_of,
)
from mhc_lightning.errors import UserError

ARROW = "datasets folder"
STATE = "state.json"
_COLUMN = "input_ids"
# Columns that say which ids are not predicted, and the number that says so.
_CONTEXT_COLUMNS = {"labels": -100, "completion_mask": 0, "assistant_masks": 0}


def read_datasets(state: Path) -> list[TokenFile] | None:
    """The Arrow files that a `state.json` names; None if it is not one of `datasets`.

    Raises:
        UserError: A file is missing or damaged, has no lists of ids, or pyarrow is not installed.
    """
    try:
        files = json.loads(state.read_bytes())["_data_files"]
        names = [str(file["filename"]) for file in files]
    except (ValueError, OSError, KeyError, TypeError):
        return None
    return [_read_arrow(state.parent / name) for name in names]


def _read_arrow(path: Path) -> TokenFile:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError(
            f"{path} is an Arrow file, which needs pyarrow: pip install 'mhc-lightning[formats]'"
        ) from error
    if not path.is_file():
        raise UserError(f"{path} is missing, though {STATE} names it; copy the folder again")
    size_of(path)
    try:
        with pa.memory_map(str(path)) as mapped:
            whole = mapped.read_buffer()
            reader = pa.ipc.open_stream(pa.BufferReader(whole))
            ids = _Column(path, reader.schema, _COLUMN)
            context = _context_column(path, reader.schema)
            for batch in reader:
                for column in filter(None, (ids, context)):
                    column.add(batch, whole)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the folder again") from error
    lengths = ids.row_lengths()
    used = {_COLUMN}
    mask = None
    if context is not None:
        used.add(context.name)
        mask = Context(context.file(), _CONTEXT_COLUMNS[context.name])
        if not np.array_equal(context.row_lengths(), lengths):
            raise UserError(
                f"{path} has rows whose {context.name} are not as many as their {_COLUMN}; make"
                " the column again, or take it out"
            )
    others = [name for name in reader.schema.names if name not in used]
    note = f"columns not used: {', '.join(others)}" if others else ""
    documents = sample_documents(np.cumsum(lengths)) if len(lengths) else None
    return replace(ids.file(), documents=documents, context=mask, note=note)


def _context_column(path: Path, schema: Any) -> "_Column | None":
    """The column that says which ids are not predicted, if there is one."""
    for name in _CONTEXT_COLUMNS:
        if name in schema.names and _holds_lists(schema.field(name).type):
            return _Column(path, schema, name)
    return None


def _holds_lists(kind: Any) -> bool:
    """True for lists of whole numbers."""
    import pyarrow as pa

    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return (lists or pa.types.is_fixed_size_list(kind)) and pa.types.is_integer(kind.value_type)


class _Column:
    """Where the numbers of a column of lists lie in an Arrow file."""

    def __init__(self, path: Path, schema: Any, name: str) -> None:
        if name not in schema.names:
            raise UserError(
                f"{path} has no column {name} but {', '.join(schema.names)}; tokenize the dataset"
                f" into {name}, or give its text to `prepare`"
            )
        kind = schema.field(name).type
        if not _holds_lists(kind):
            raise UserError(f"{path}: the column {name} holds {kind}, not lists of whole numbers")
        self.path, self.name = path, name
        self.dtype = np.dtype(kind.value_type.to_pandas_dtype()).newbyteorder("<")
        self._starts: list[int] = []
        self._runs: list[int] = []
        self._rows: list[np.ndarray] = []

    def add(self, batch: Any, whole: Any) -> None:
        """Take a record batch, whose buffers are parts of that of the `whole` file."""
        column = batch.column(self.name)
        values = column.flatten()
        if column.null_count or values.null_count:
            raise UserError(f"{self.path} has rows without {self.name}; leave them out")
        self._rows.append(_row_lengths(column))
        if not len(values):
            return
        start = values.buffers()[1].address - whole.address + values.offset * self.dtype.itemsize
        if not 0 <= start <= whole.size - len(values) * self.dtype.itemsize:
            raise UserError(
                f"{self.path} is compressed, so that it cannot be read in part; save the dataset"
                " again without compression"
            )
        self._starts.append(start)
        self._runs.append(len(values))

    def row_lengths(self) -> np.ndarray:
        """Numbers in each row, int64 [rows]."""
        return np.concatenate([np.empty(0, np.int64), *self._rows])

    def file(self) -> TokenFile:
        """The numbers as tokens of the file."""
        ends = np.cumsum(self._runs, dtype=np.int64)
        return TokenFile(self.path, self.dtype, np.array(self._starts, np.int64), ends)


def _row_lengths(column: Any) -> np.ndarray:
    import pyarrow.compute as pc

    return np.asarray(pc.list_value_length(column), dtype=np.int64)
