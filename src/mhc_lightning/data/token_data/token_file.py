"""A file of tokens made elsewhere: where its tokens are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhc_lightning.errors import UserError

_SAMPLED_DOCUMENTS = 256


@dataclass(frozen=True)
class Documents:
    """What a format knows about the documents of a file.

    Attributes:
        count: Number of documents.
        last_tokens: Places in the file of the last tokens of some non-empty documents, evenly
            spaced.
    """

    count: int
    last_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """What says which tokens of a file are read and not predicted, such as those of a prompt.

    Attributes:
        values: A number for each token.
        value: The number of tokens that are not predicted.
    """

    values: "TokenFile"
    value: int


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens.

    Attributes:
        path: The file.
        dtype: Type of a stored token, little-endian.
        starts: Bytes before the first token of each run of tokens, int64 [runs].
        ends: Tokens up to the end of each run, int64 [runs].
        documents: Its documents; None if the format does not know them.
        context: Which tokens are not predicted; None if all are.
        note: What else there is to say about it.
    """

    path: Path
    dtype: np.dtype[Any]
    starts: np.ndarray
    ends: np.ndarray
    documents: Documents | None = None
    context: Context | None = None
    note: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.ends[-1]) if len(self.ends) else 0


def one_run(
    path: Path,
    dtype: np.dtype[Any],
    tokens: int,
    offset: int = 0,
    documents: Documents | None = None,
    context: Context | None = None,
    note: str = "",
) -> TokenFile:
    """A file that holds its tokens one after the other from a byte on."""
    return TokenFile(path, dtype, np.array([offset]), np.array([tokens]), documents, context, note)


def sample_documents(ends: np.ndarray) -> Documents:
    """The documents of a file.

    Args:
        ends: Tokens up to the end of each document, ascending, [documents].
    """
    count = len(ends)
    chosen = np.unique(np.linspace(0, count - 1, min(count, _SAMPLED_DOCUMENTS)).astype(np.int64))
    places = [int(ends[i]) - 1 for i in chosen if int(ends[i]) > (int(ends[i - 1]) if i else 0)]
    return Documents(count, tuple(places))


def size_of(path: Path) -> int:
    """Bytes of a file.

    Raises:
        UserError: It is empty, or cannot be read.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"token file {path} cannot be read: {error.strerror}") from error
    if not size:
        raise UserError(f"token file {path} is empty; make it again, or take it out of the folder")
    return size


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return stream.read(count)
    except OSError as error:
        raise UserError(f"token file {path} cannot be read: {error.strerror}") from error
