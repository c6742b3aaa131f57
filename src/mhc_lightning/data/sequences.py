"""Sequences of tokens by number: what the loaders' workers read.

Sequence i of a chunk is its tokens [i·S, i·S + S], S + 1 of them: each token but a chunk's first
is predicted exactly once. The few tokens at a chunk's end that fill no sequence are not trained on;
in validation they make a shorter one.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mhc_lightning.data.order import EpochOrder, Mixture
from mhc_lightning.data.prepared import TRAIN, VALIDATION, Chunk, PreparedData
from mhc_lightning.kernels import IGNORE_INDEX

_OPEN_CHUNKS = 128  # each mapped file holds a file descriptor


def sequences_in(chunk: Chunk, sequence_length: int) -> int:
    """How many whole sequences a chunk gives."""
    return max(0, (chunk.tokens - 1) // sequence_length)


def predicted_tokens(chunk: Chunk, sequence_length: int) -> list[int]:
    """How many tokens each sequence of a chunk predicts, the last one perhaps fewer.

    Together they predict every token of the chunk but its first.
    """
    whole = sequences_in(chunk, sequence_length)
    rest = max(0, chunk.tokens - 1 - whole * sequence_length)
    return [sequence_length] * whole + [rest] * (rest > 0)


class _Reader:
    """Reads sequences of several sources, keeping the chunks mapped that were used last."""

    def __init__(self, sources: Sequence[PreparedData], split: str, sequence_length: int) -> None:
        self.sources = sources
        self.sequence_length = sequence_length
        self._chunks = [source.chunks(split) for source in sources]
        self._mapped: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_mapped": OrderedDict()}

    def chunk(self, source: int, chunk: int) -> Chunk:
        return self._chunks[source][chunk]

    def read(self, source: int, chunk: int, sequence: int) -> np.ndarray:
        key = (source, chunk)
        tokens = self._mapped.pop(key, None)
        if tokens is None:
            tokens = self.sources[source].tokens(self._chunks[source][chunk])
            while len(self._mapped) >= _OPEN_CHUNKS:
                self._mapped.popitem(last=False)
        self._mapped[key] = tokens
        start = sequence * self.sequence_length
        return tokens[start : start + self.sequence_length + 1]


def _stack(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))


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
        rows = []
        for position in positions:
            source, index = self.mixture.locate(position)
            self._prefetch(source, index)
            rows.append(self._reader.read(source, *self.orders[source].locate(index)))
        return _stack(rows)

    def epochs(self, position: int) -> list[int]:
        """How many whole passes over each source come before a position."""
        return [
            drawn // order.length
            for drawn, order in zip(self.mixture.drawn(position), self.orders, strict=True)
        ]

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
        self._row = sequence_length + 1
        self._places: list[tuple[int, int, int]] = []
        self.num_tokens: list[int] = []
        for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
            every = [
                ((number, chunk, row), tokens)
                for chunk, held in enumerate(source.chunks(VALIDATION))
                for row, tokens in enumerate(predicted_tokens(held, sequence_length))
            ]
            whole = [place for place in every if place[1] == sequence_length]
            among = whole if count <= len(whole) else every
            chosen = [among[place * len(among) // count] for place in range(count)]
            self._places += [place for place, _ in chosen]
            self.num_tokens.append(sum(tokens for _, tokens in chosen))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Some of the sequences, int64 [len(indices), sequence_length + 1]."""
        batch = torch.full((len(indices), self._row), IGNORE_INDEX)
        for row, index in zip(batch, indices, strict=True):
            if index < len(self._places):
                tokens = self._reader.read(*self._places[index])
                row[: len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        return batch
