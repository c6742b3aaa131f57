"""What training reads: tokens in spans of files, prepared here or made elsewhere."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mhc_lightning.data.chunk_cache import ChunkCache
from mhc_lightning.data.chunk_file import Span
from mhc_lightning.data.prepared_record import VALIDATION
from mhc_lightning.data.tokenizers import Tokenizer


class TokenReader(Protocol):
    """An opened span of tokens."""

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the span; fewer at its end."""

    def check_again(self) -> None:
        """Raise a `UserError` if the file is no longer the one that was opened."""

    def close(self) -> None:
        """Close the file."""


class TokenSource(ABC):
    """One value of `data.path`, opened.

    Attributes:
        path: As in `data.path`.
        kind: What it was taken for, for people.
        cache: Local copies of its files, where they are at a URL.
        tokenizer: The tokenizer of the tokens; None if nobody named it.
    """

    path: str
    kind: str
    cache: ChunkCache | None = None
    tokenizer: Tokenizer | None

    @property
    @abstractmethod
    def content(self) -> str:
        """Checksum of the tokens and their splits; names the data in checkpoints."""

    @property
    @abstractmethod
    def tokenizer_fingerprint(self) -> str | None:
        """See `Tokenizer.fingerprint`; None without a tokenizer."""

    @property
    @abstractmethod
    def vocab_size(self) -> int | None:
        """Ids of the tokenizer; None without one."""

    @property
    @abstractmethod
    def end_of_document(self) -> int | None:
        """Id of the token that ends each document; None if it is not known."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The kind and amount of the data, in one line."""

    @property
    @abstractmethod
    def how_to_hold_out(self) -> str:
        """What to do for a validation split, where there is none."""

    @property
    @abstractmethod
    def how_to_lengthen(self) -> str:
        """What to do where no span is as long as a sequence."""

    @abstractmethod
    def chunks(self, split: str) -> Sequence[Span]:
        """The spans of `train` or `validation`, in order."""

    @abstractmethod
    def open_chunk(self, chunk: Any) -> TokenReader:
        """Open one of the `chunks`.

        Raises:
            UserError: Its file is missing, damaged or cannot be read.
        """

    def num_tokens(self, split: str) -> int:
        """Tokens of a split."""
        return sum(chunk.tokens for chunk in self.chunks(split))

    def bytes_per_token(self, split: str = VALIDATION) -> float:
        """Bytes of text per token, [bytes/token]; NaN where they are not known."""
        return float("nan")

    def prefetch(self, chunks: Sequence[Any]) -> None:  # noqa: B027  (local files need none)
        """Begin to fetch chunks that are about to be read."""
