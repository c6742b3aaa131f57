"""Sequences of tokens read from chunk files by number.

Sequence i of a chunk is its tokens [i·S, i·S + S], S + 1 of them: each token but a chunk's first
is predicted exactly once. The tokens at a chunk's end that fill no sequence are not trained on; in
validation they make a shorter sequence.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from mhc_lightning.data.chunk_file import Span
from mhc_lightning.data.token_source import TokenReader, TokenSource
from mhc_lightning.kernels import IGNORE_INDEX

_OPEN_CHUNKS = 128  # each holds a file descriptor

SequencePlace = tuple[int, int, int]  # source, chunk, number of the sequence in the chunk


def sequences_in(chunk: Span, sequence_length: int) -> int:
    """Number of whole sequences in a chunk."""
    return max(0, (chunk.tokens - 1) // sequence_length)


class SequenceReader:
    """Reads sequences of several sources; keeps the most recently used chunks open.

    Args:
        sources: The opened data.
        split: `train` or `validation`.
        sequence_length: Tokens to predict per sequence.
    """

    def __init__(self, sources: Sequence[TokenSource], split: str, sequence_length: int) -> None:
        self.sources = sources
        self.sequence_length = sequence_length
        self._chunks = [source.chunks(split) for source in sources]
        self._open: OrderedDict[tuple[int, int], TokenReader] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def chunk(self, source: int, chunk: int) -> Span:
        """A chunk of a source."""
        return self._chunks[source][chunk]

    def batch(self, places: Iterable[SequencePlace | None], size: int) -> Tensor:
        """The sequences at some places, int64 [size, sequence_length + 1].

        A shorter sequence is padded at its end with `IGNORE_INDEX`. The row for None is padding
        alone.

        Raises:
            UserError: A chunk is missing, damaged, or was changed since it was opened.
        """
        length = self.sequence_length
        rows = np.empty((size, length + 1), np.int64)
        files: dict[tuple[int, int], TokenReader] = {}
        for row, place in enumerate(places):
            filled = 0
            if place is not None:
                source, chunk, sequence = place
                file = files.get((source, chunk))
                if file is None:
                    file = files[source, chunk] = self._open_chunk(source, chunk)
                tokens = file.read(sequence * length, length + 1)
                filled = len(tokens)
                rows[row, :filled] = tokens
            if filled <= length:
                rows[row, filled:] = IGNORE_INDEX
        return torch.from_numpy(rows)

    def _open_chunk(self, source: int, chunk: int) -> TokenReader:
        key = (source, chunk)
        file = self._open.pop(key, None)
        if file is None:
            file = self.sources[source].open_chunk(self._chunks[source][chunk])
            while len(self._open) >= _OPEN_CHUNKS:
                self._open.popitem(last=False)
        else:
            file.check_again()
        self._open[key] = file
        return file
