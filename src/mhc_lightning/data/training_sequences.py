"""Sequences of tokens by number: what the loaders' workers read.

Sequence i of a chunk is its tokens [i·S, i·S + S], S + 1 of them: each token but a chunk's first
is predicted exactly once. The few tokens at a chunk's end that fill no sequence are not trained on;
in validation they make a shorter one.
"""

import bisect
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from mhc_lightning.data.chunk_file import Chunk, ChunkFile
from mhc_lightning.data.prepared_data import PreparedData
from mhc_lightning.data.prepared_record import TRAIN, VALIDATION
from mhc_lightning.data.shuffling import EpochOrder, Mixture
from mhc_lightning.kernels import IGNORE_INDEX

_OPEN_CHUNKS = 128  # each holds a file descriptor

_Place = tuple[int, int, int]  # source, chunk, and number of the sequence in it


def sequences_in(chunk: Chunk, sequence_length: int) -> int:
    """How many whole sequences a chunk gives."""
    return max(0, (chunk.tokens - 1) // sequence_length)


def held_out_sequences_in(chunk: Chunk, sequence_length: int) -> int:
    """How many sequences a chunk gives in validation, the last one perhaps shorter.

    Together they predict every token of the chunk but its first.
    """
    return max(0, math.ceil((chunk.tokens - 1) / sequence_length))


class _Reader:
    """Reads sequences of several sources, keeping the chunks open that were used last."""

    def __init__(self, sources: Sequence[PreparedData], split: str, sequence_length: int) -> None:
        self.sources = sources
        self.sequence_length = sequence_length
        self._chunks = [source.chunks(split) for source in sources]
        self._open: OrderedDict[tuple[int, int], ChunkFile] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def chunk(self, source: int, chunk: int) -> Chunk:
        return self._chunks[source][chunk]

    def batch(self, places: Iterable[_Place | None], size: int) -> Tensor:
        """The sequences at some places, int64 [size, sequence_length + 1].

        What a shorter sequence, and None, leave of a row is ``IGNORE_INDEX``.

        Raises:
            UserError: A chunk is missing, damaged, or was changed since it was opened.
        """
        length = self.sequence_length
        rows = np.empty((size, length + 1), np.int64)
        used: dict[tuple[int, int], ChunkFile] = {}
        for row, place in enumerate(places):
            filled = 0
            if place is not None:
                source, chunk, sequence = place
                tokens = used.get((source, chunk))
                if tokens is None:
                    tokens = used[source, chunk] = self._opened(source, chunk)
                found = tokens.read(sequence * length, length + 1)
                filled = len(found)
                rows[row, :filled] = found
            if filled <= length:
                rows[row, filled:] = IGNORE_INDEX
        return torch.from_numpy(rows)

    def _opened(self, source: int, chunk: int) -> ChunkFile:
        key = (source, chunk)
        tokens = self._open.pop(key, None)
        if tokens is None:
            tokens = self.sources[source].open_chunk(self._chunks[source][chunk])
            while len(self._open) >= _OPEN_CHUNKS:
                self._open.popitem(last=False)
        else:
            tokens.check_again()
        self._open[key] = tokens
        return tokens


class TrainingSequences(torch.utils.data.Dataset[Tensor]):
    """The endless training stream: positions to sequences.

    Args:
        sources: The prepared folders.
        weights: How often each is drawn from, in proportion.
        sequence_length: Tokens to predict per sequence.
        seed: Names the order.
        window: Chunks per shuffling window.
    """

    def __init__(
        self,
        sources: Sequence[PreparedData],
        weights: Sequence[float],
        sequence_length: int,
        seed: int,
        window: int,
    ) -> None:
        self._reader = _Reader(sources, TRAIN, sequence_length)
        self.mixture = Mixture(weights, f"{seed}/mixture")
        self.orders = [
            EpochOrder(
                [sequences_in(chunk, sequence_length) for chunk in source.chunks(TRAIN)],
                window,
                f"{seed}/{number}",
            )
            for number, source in enumerate(sources)
        ]
        self._windows: dict[int, tuple[int, int]] = {}

    def __getitem__(self, position: int) -> Tensor:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> Tensor:
        """The sequences at some positions, int64 [len(positions), sequence_length + 1]."""
        return self._reader.batch(map(self._place, positions), len(positions))

    def epochs(self, position: int) -> list[int]:
        """How many whole passes over each source come before a position."""
        return [
            drawn // order.length
            for drawn, order in zip(self.mixture.drawn(position), self.orders, strict=True)
        ]

    def _place(self, position: int) -> _Place:
        source, index = self.mixture.locate(position)
        self._prefetch(source, index)
        return source, *self.orders[source].locate(index)

    def _prefetch(self, source: int, index: int) -> None:
        """On entering a window of remote chunks, fetch the rest of it and then the next one."""
        cache = self._reader.sources[source].cache
        order = self.orders[source]
        if cache is None or self._windows.get(source) == order.window_at(index):
            return
        epoch, number = self._windows[source] = order.window_at(index)
        current = order.chunks_of(epoch, number)
        chunks = [
            self._reader.chunk(source, chunk)
            for chunk in dict.fromkeys(current + order.chunks_of(epoch, number + 1))
        ]
        cache.prefetch([(chunk.name, chunk.size) for chunk in chunks])


class ValidationSequences(torch.utils.data.Dataset[Tensor]):
    """A fixed choice of held-out sequences, evenly spaced over each source's validation split.

    Sequences are whole where that many are; else those shorter ones are among them that the ends of
    chunks leave. Shorter ones are padded behind their end with ``IGNORE_INDEX`` (-100), and so is a
    row for an index beyond the last sequence, all of it.

    Args:
        sources: The prepared folders.
        counts: How many sequences of each.
        sequence_length: Tokens to predict per sequence.

    Attributes:
        num_tokens: Tokens predicted in the sequences of each source.
    """

    def __init__(
        self, sources: Sequence[PreparedData], counts: Sequence[int], sequence_length: int
    ) -> None:
        self._reader = _Reader(sources, VALIDATION, sequence_length)
        self._places: list[_Place] = []
        self.num_tokens: list[int] = []
        for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
            chunks = source.chunks(VALIDATION)
            sizes = [sequences_in(chunk, sequence_length) for chunk in chunks]
            if count > sum(sizes):
                sizes = [held_out_sequences_in(chunk, sequence_length) for chunk in chunks]
            ends = list(itertools.accumulate(sizes))
            predicted = 0
            for place in range(count):
                index = place * ends[-1] // count
                chunk = bisect.bisect_right(ends, index)
                row = index - (ends[chunk] - sizes[chunk])
                self._places.append((number, chunk, row))
                rest = chunks[chunk].tokens - 1 - row * sequence_length
                predicted += min(sequence_length, rest)
            self.num_tokens.append(predicted)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Some of the sequences, int64 [len(indices), sequence_length + 1]."""
        held = len(self._places)
        places = [self._places[index] if index < held else None for index in indices]
        return self._reader.batch(places, len(indices))
