r"""Megatron-LM's `.bin` and `.idx`: the tokens, and where sequences and documents end.

The index: `MMIDIDX\0\0`; a version, uint64; the code of the tokens' type, uint8; the numbers of
sequences and of document ends, uint64; then the length of each sequence in tokens, int32, the byte
at which it begins, int64, the numbers of the sequences at which documents begin and the last ends,
int64; and for data of several modes a byte for each sequence.
"""

import struct
from pathlib import Path

import numpy as np

from mhc_lightning.data.token_data.token_file import (
    TokenFile,
    first_bytes,
    one_run,
    sample_documents,
    size_of,
)
from mhc_lightning.errors import UserError

MEGATRON = "Megatron-LM .bin/.idx"

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_TYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float32",
    8: "uint16",
}
_BLOCK = 1 << 20  # sequences checked at once


def read_megatron(index: Path) -> TokenFile:
    """The tokens of an index and the `.bin` beside it.

    Raises:
        UserError: One of the files is missing, cut short, of another kind or not of the other.
    """
    data = index.with_suffix(".bin")
    size = size_of(index)
    head = first_bytes(index, _HEADER.size)
    if not head.startswith(_MAGIC):
        raise UserError(
            f"{index} does not begin with MMIDIDX, as an index of Megatron-LM does; it is damaged,"
            " or another kind of file: take it out of the folder"
        )
    if not data.is_file():
        raise UserError(f"{index} has no {data.name} beside it, which would hold its tokens")
    if size < _HEADER.size:
        raise UserError(f"{index} is cut short within its header; copy it again")
    _, version, code, sequences, ends = _HEADER.unpack(head)
    if version != _VERSION:
        raise UserError(
            f"{index} has version {version} of Megatron-LM's format; version {_VERSION} is known"
        )
    name = _TYPES.get(code)
    if name is None or name.startswith("float"):
        raise UserError(
            f"{index} says that its tokens are of type {code}"
            f" ({name or 'unknown'}), which is no type of whole numbers"
        )
    dtype = np.dtype(name).newbyteorder("<")
    needed = _HEADER.size + 12 * sequences + 8 * ends
    if size not in (needed, needed + sequences):  # with a byte of mode for each sequence
        raise UserError(
            f"{index} has {size} bytes and needs {needed} for its {sequences} sequences and {ends}"
            " document ends; it was cut short or changed: copy it again"
        )
    tokens = size_of(data) // dtype.itemsize
    if not sequences:
        raise UserError(f"{index} lists no sequences; make it again, or take it out of the folder")
    table = np.memmap(index, np.uint8, "r", _HEADER.size)
    lengths = table[: 4 * sequences].view("<i4")
    pointers = table[4 * sequences : 12 * sequences].view("<i8")
    borders = table[12 * sequences : 12 * sequences + 8 * ends].view("<i8")
    _check_sequences(index, lengths, pointers, dtype.itemsize, size_of(data))
    documents = None
    if ends > 1:
        _check_borders(index, borders, sequences)
        document_ends = np.append(pointers, size_of(data))[borders[1:]] // dtype.itemsize
        documents = sample_documents(document_ends)
    note = "" if size == needed else "modes of its sequences are not used"
    return one_run(data, dtype, tokens, documents=documents, note=note)


def _check_sequences(
    index: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int, size: int
) -> None:
    """Check that the sequences follow each other, and fill the data."""
    expected = 0
    for start in range(0, len(lengths), _BLOCK):
        counted = lengths[start : start + _BLOCK].astype(np.int64)
        ends = expected + np.cumsum(counted) * itemsize
        begins = np.append(expected, ends[:-1])
        if counted.min() < 0 or (pointers[start : start + _BLOCK] != begins).any():
            raise UserError(
                f"{index} lists sequences that do not follow each other in their .bin; it is"
                " damaged: copy it again"
            )
        expected = int(ends[-1])
    if expected != size:
        raise UserError(
            f"{index} lists {expected} bytes of tokens, and {index.with_suffix('.bin').name} has"
            f" {size}; one of them was cut short, or belongs to other data: copy both again"
        )


def _check_borders(index: Path, borders: np.ndarray, sequences: int) -> None:
    """Check that documents divide the sequences."""
    if borders[0] != 0 or borders[-1] != sequences or (np.diff(borders) < 0).any():
        raise UserError(
            f"{index} lists documents that do not divide its {sequences} sequences; it is damaged:"
            " copy it again"
        )
