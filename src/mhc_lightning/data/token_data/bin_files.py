"""`.bin` files: those of llm.c with its header, and nanoGPT's, which are tokens alone.

llm.c (and modded-nanogpt): 256 int32, of which the first three are a magic number, a version and
the number of tokens; then the tokens. nanoGPT: uint16 tokens, without anything that says so.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.data.token_data.token_file import TokenFile, first_bytes, one_run, size_of
from mhc_lightning.errors import UserError

LLM_C = "llm.c .bin"
NANOGPT = "nanoGPT .bin"

_HEADER = np.dtype("<i4")
_HEADER_BYTES = 256 * 4
_LAYOUTS: dict[int, tuple[int, np.dtype[Any]]] = {  # by magic number: version, type
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}
_LOOKED_AT = 1 << 20  # bytes that tell 16 from 32 bits
_LARGEST_HIGH_HALF = 15  # of 32 bits: vocabularies of up to a million tokens
_FEWEST_PAIRS = 64
_OTHER_FILES = {
    b"PK\x03\x04": "a zip archive or a PyTorch checkpoint",
    b"\x1f\x8b\x08": "gzip-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"GGUF": "a GGUF model",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
}


def read_bin(path: Path) -> tuple[str, TokenFile]:
    """A `.bin` file, and what it was taken for.

    Raises:
        UserError: It is empty, cut short, or another kind of file.
    """
    size = size_of(path)
    head = first_bytes(path, _LOOKED_AT)
    for magic, name in _OTHER_FILES.items():
        if head.startswith(magic):
            raise UserError(
                f"{path} is no file of tokens but {name}; name the files of tokens in data.path"
            )
    if size >= _HEADER_BYTES:
        header = np.frombuffer(head[:_HEADER_BYTES], _HEADER)
        if int(header[0]) in _LAYOUTS:
            return LLM_C, _with_header(path, size, header)
        if _looks_like_header(header, size):
            raise UserError(
                f"{path} has a header like those of llm.c, but the magic number {header[0]};"
                f" token files have {' or '.join(map(str, _LAYOUTS))}"
            )
    return NANOGPT, _without_header(path, size, head)


def _with_header(path: Path, size: int, header: np.ndarray) -> TokenFile:
    magic, version, tokens = (int(number) for number in header[:3])
    known, dtype = _LAYOUTS[magic]
    if version != known:
        raise UserError(
            f"{path} has version {version} of llm.c's format; version {known} is known:"
            " write it again with that one"
        )
    held, rest = divmod(size - _HEADER_BYTES, dtype.itemsize)
    if rest or held != tokens:
        raise UserError(
            f"{path} has {held} tokens, and its header says {tokens}; it was cut short or changed:"
            " copy it again"
        )
    if not tokens:
        raise UserError(f"{path} holds no tokens; make it again, or take it out of the folder")
    return one_run(path, dtype, tokens, _HEADER_BYTES)


def _looks_like_header(header: np.ndarray, size: int) -> bool:
    """True if the third number counts what follows, and nearly all others are zero."""
    counted = [_HEADER_BYTES + int(header[2]) * itemsize for itemsize in (2, 4)]
    return not header[16:].any() and (size in counted or 20240000 <= int(header[0]) < 20300000)


def _without_header(path: Path, size: int, head: bytes) -> TokenFile:
    if size % 2:
        raise UserError(
            f"{path} has {size} bytes, an odd number, so it is not uint16 tokens;"
            " it was cut short, or is another kind of file"
        )
    dtype: np.dtype[Any] = np.dtype("<u2")
    if size % 4 == 0 and _is_wide(np.frombuffer(head[: len(head) // 4 * 4], dtype)):
        dtype = np.dtype("<u4")
    return one_run(path, dtype, size // dtype.itemsize)


def _is_wide(halves: np.ndarray) -> bool:
    """True if 16-bit numbers are the halves of 32-bit ids: every other one is tiny."""
    low, high = halves[0::2], halves[1::2]
    return len(low) >= _FEWEST_PAIRS and bool(high.max() <= _LARGEST_HIGH_HALF < low.max())
