"""litdata's chunks of tokens, as `optimize` and `TokensLoader` have them: `index.json` and chunks.

A chunk has a header of uint32 (the number n of its items, and n + 1 offsets), and then the tokens.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.token_data.token_file import TokenFile, one_run, size_of
from mhc_lightning.errors import UserError

LITDATA = "litdata chunks"
INDEX = "index.json"

# The numbers by which litdata names types of whole numbers, by serializer.
_TYPES = {
    "no_header_numpy": dict(enumerate(("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"))),
    "no_header_tensor": {
        **dict(enumerate(("u1", "i1", "i2", "i2", "i4", "i4", "i8", "i8"), 11)),
        20: "u2",
    },
}


def read_litdata(index: Path) -> list[TokenFile] | None:
    """The chunks of an `index.json`; None if it is not one of litdata.

    Raises:
        UserError: It is damaged, its items are no tokens, or a chunk is missing or cut short.
    """
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, OSError):
        return None
    if not (isinstance(content, dict) and {"chunks", "config"} <= set(content)):
        return None
    try:
        dtype = _dtype(index, content["config"])
        return [_chunk(index, entry, dtype) for entry in content["chunks"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{index} cannot be understood ({error!r}); copy the folder again"
        ) from error


def _dtype(index: Path, config: dict[str, Any]) -> np.dtype[Any]:
    if config.get("compression"):
        raise UserError(
            f"{index.parent} has chunks that are compressed ({config['compression']}), which cannot"
            " be read in part; write them again without compression"
        )
    if config.get("encryption"):
        raise UserError(f"{index.parent} has encrypted chunks; write them again without encryption")
    formats = config["data_format"]
    serializer, _, number = str(formats[0]).partition(":")
    name = _TYPES.get(serializer, {}).get(int(number or -1)) if len(formats) == 1 else None
    if name is None:
        raise UserError(
            f"{index.parent} has litdata items of {', '.join(map(str, formats))}, not tokens; write"
            " one-dimensional arrays of whole numbers with item_loader=TokensLoader()"
        )
    return np.dtype(f"<{name}")


def _chunk(index: Path, entry: dict[str, Any], dtype: np.dtype[Any]) -> TokenFile:
    path = index.parent / entry["filename"]
    if not path.is_file():
        raise UserError(f"{index} names {path.name}, which is missing; copy the folder again")
    if entry.get("dim") is None:
        raise UserError(
            f"{index} does not say how many tokens {path.name} has; write the chunks with"
            " item_loader=TokensLoader()"
        )
    offset, tokens = 4 * (2 + int(entry["chunk_size"])), int(entry["dim"])
    size, needed = size_of(path), offset + tokens * dtype.itemsize
    if size != needed:
        raise UserError(
            f"{path} has {size} bytes, not the {needed} of its {tokens} tokens; it was cut short or"
            " changed: copy the folder again"
        )
    return one_run(path, dtype, tokens, offset)
