"""A folder that `datasets` wrote (`save_to_disk`), with the column `input_ids`.

Each row is a list of ids. The ids of a record batch lie one after the other in its file, so they
are read there without Arrow, once the index of the file was read.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.token_data.token_file import TokenFile, sample_documents, size_of
from mhc_lightning.errors import UserError

ARROW = "datasets folder"
STATE = "state.json"
_COLUMN = "input_ids"


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
    starts: list[int] = []
    runs: list[int] = []
    rows: list[np.ndarray] = []
    try:
        with pa.memory_map(str(path)) as mapped:
            whole = mapped.read_buffer()
            reader = pa.ipc.open_stream(pa.BufferReader(whole))
            kind = _list_type(path, reader.schema)
            for batch in reader:
                column = batch.column(_COLUMN)
                ids = column.flatten()
                if column.null_count or ids.null_count:
                    raise UserError(f"{path} has rows without {_COLUMN}; leave them out")
                rows.append(_row_lengths(column))
                if not len(ids):
                    continue
                starts.append(ids.buffers()[1].address - whole.address + ids.offset * kind.itemsize)
                runs.append(len(ids))
                if not 0 <= starts[-1] <= whole.size - len(ids) * kind.itemsize:
                    raise UserError(
                        f"{path} is compressed, so that it cannot be read in part; save the"
                        " dataset again without compression"
                    )
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the folder again") from error
    ends = np.cumsum(np.concatenate(rows)) if rows else np.array([], np.int64)
    documents = sample_documents(ends) if len(ends) else None
    return TokenFile(
        path, kind, np.array(starts, np.int64), np.cumsum(runs, dtype=np.int64), documents
    )


def _list_type(path: Path, schema: Any) -> np.dtype[Any]:
    """The type of the ids."""
    import pyarrow as pa

    if _COLUMN not in schema.names:
        raise UserError(
            f"{path} has no column {_COLUMN} but {', '.join(schema.names)}; tokenize the dataset"
            f" into {_COLUMN}, or give its text to `prepare`"
        )
    kind = schema.field(_COLUMN).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (lists or pa.types.is_fixed_size_list(kind)) or not pa.types.is_integer(kind.value_type):
        raise UserError(f"{path}: the column {_COLUMN} holds {kind}, not lists of whole numbers")
    return np.dtype(kind.value_type.to_pandas_dtype()).newbyteorder("<")


def _row_lengths(column: Any) -> np.ndarray:
    import pyarrow.compute as pc

    return np.asarray(pc.list_value_length(column), dtype=np.int64)
