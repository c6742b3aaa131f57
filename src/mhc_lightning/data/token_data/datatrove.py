"""`datatrove`'s `.ds` files: tokens alone, and `.ds.index`, where each document ends.

The index holds the tokens up to the end of each document, uint64. Beside it may be `.ds.metadata`
(name of the tokenizer and, in newer versions, the bytes of a token; then the number of tokens) and
`.ds.loss`, a byte for each token, which says whether it is trained on.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.token_data.token_file import (
    Context,
    TokenFile,
    first_bytes,
    one_run,
    sample_documents,
    size_of,
)
from mhc_lightning.errors import UserError

DATATROVE = "datatrove .ds"

_TYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_METADATA_BYTES = 1 << 12


def read_datatrove(path: Path) -> TokenFile:
    """The tokens of a `.ds` file.

    Raises:
        UserError: It is empty, cut short, or does not match its index or metadata.
    """
    size = size_of(path)
    index = path.with_name(f"{path.name}.index")
    ends = _ends(index) if index.is_file() else None
    metadata = path.with_name(f"{path.name}.metadata")
    tokens, shown = (int(ends[-1]), index) if ends is not None else (None, path)
    if tokens is None and metadata.is_file():
        tokens, shown = _counted(metadata), metadata
    if tokens is None:
        tokens = size // 2
    dtype = next((t for width, t in _TYPES.items() if tokens * width == size), None)
    if dtype is None:
        raise UserError(
            f"{path} has {size} bytes, which are not the {tokens} tokens of 2 or 4 bytes that"
            f" {shown.name} says; it was cut short or changed: copy it again"
        )
    documents = None if ends is None else sample_documents(ends)
    loss = path.with_name(f"{path.name}.loss")
    if not loss.is_file():
        return one_run(path, dtype, tokens, documents=documents)
    if size_of(loss) != tokens:
        raise UserError(
            f"{loss} has {size_of(loss)} bytes for {tokens} tokens; it was cut short or changed:"
            " copy it again"
        )
    context = Context(one_run(loss, np.dtype("u1"), tokens), 0)
    return one_run(path, dtype, tokens, documents=documents, context=context)


def _ends(index: Path) -> np.ndarray:
    size = size_of(index)
    if size % 8:
        raise UserError(
            f"{index} has {size} bytes, no multiple of 8; it was cut short: copy it again"
        )
    ends = np.memmap(index, "<u8", "r")
    if (ends[1:] < ends[:-1]).any():
        raise UserError(f"{index} lists documents that end before they begin; copy it again")
    return ends


def _counted(metadata: Path) -> int | None:
    lines = first_bytes(metadata, _METADATA_BYTES).decode("utf-8", "replace").splitlines()
    return int(lines[1]) if len(lines) > 1 and lines[1].isdigit() else None
