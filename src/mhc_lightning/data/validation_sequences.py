"""The held-out sequences of validation: their choice, and their division among ranks."""

import bisect
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_lightning.data.chunk_file import Span
from mhc_lightning.data.prepared_record import VALIDATION
from mhc_lightning.data.sequence_reader import SequencePlace, SequenceReader, sequences_in
from mhc_lightning.data.shuffling import apportion
from mhc_lightning.data.token_source import TokenSource


def held_out_sequences_in(chunk: Span, sequence_length: int) -> int:
    """Number of validation sequences in a chunk, of which the last may be shorter.

    Together they predict every token of the chunk but its first.
    """
    return max(0, math.ceil((chunk.tokens - 1) / sequence_length))


class ValidationSequences(torch.utils.data.Dataset[Tensor]):
    """A fixed choice of held-out sequences, evenly spaced over each source's validation split.

    If a source has enough whole sequences, only those are chosen; else the shorter ones at the ends
    of chunks are chosen too. A shorter sequence is padded at its end with `IGNORE_INDEX` (-100). A
    row for an index beyond the last sequence is padding alone.

    Args:
        sources: The opened data.
        counts: Number of sequences of each.
        sequence_length: Tokens to predict per sequence.

    Attributes:
        num_tokens: Tokens predicted in the sequences of each source.
    """

    def __init__(
        self, sources: Sequence[TokenSource], counts: Sequence[int], sequence_length: int
    ) -> None:
        self._reader = SequenceReader(sources, VALIDATION, sequence_length)
        self._places: list[SequencePlace] = []
        self.num_tokens: list[int] = []
        for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
            chunks = source.chunks(VALIDATION)
            sizes = [sequences_in(chunk, sequence_length) for chunk in chunks]
            if count > sum(sizes):
                sizes = [held_out_sequences_in(chunk, sequence_length) for chunk in chunks]
            ends = list(itertools.accumulate(sizes))
            predicted = 0
            for chosen in range(count):
                index = chosen * ends[-1] // count
                chunk = bisect.bisect_right(ends, index)
                row = index - (ends[chunk] - sizes[chunk])
                self._places.append((number, chunk, row))
                predicted += min(sequence_length, chunks[chunk].tokens - 1 - row * sequence_length)
            self.num_tokens.append(predicted)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Some of the sequences, int64 [len(indices), sequence_length + 1]."""
        count = len(self._places)
        places = [self._places[index] if index < count else None for index in indices]
        return self._reader.batch(places, len(indices))


def validation_counts(
    sources: Sequence[TokenSource],
    weights: Sequence[float],
    sequence_length: int,
    total: int | None,
) -> list[int]:
    """Number of held-out sequences to use of each source; the last of a chunk may be shorter.

    Args:
        sources: The opened data.
        weights: Weights of the sources in training, by which `total` is divided.
        sequence_length: Tokens to predict per sequence.
        total: Number of sequences over all sources; None for all of them.
    """
    available = [
        sum(held_out_sequences_in(chunk, sequence_length) for chunk in data.chunks(VALIDATION))
        for data in sources
    ]
    if total is None:
        return available
    shares = apportion(total, weights)
    return [min(count, int(share)) for count, share in zip(available, shares, strict=True)]


def validation_batches(
    total: int, micro_batch_size: int, rank: int, world_size: int
) -> list[range]:
    """The sequence indices of each batch of a rank; each sequence comes once, on one rank.

    Every rank gets the same number of batches of the same size, as collectives need. Indices from
    `total` on stand for padding. Batches are smaller if there are too few sequences to give every
    rank a full batch.

    Args:
        total: Number of sequences.
        micro_batch_size: Sequences per batch.
        rank: Data-parallel rank.
        world_size: Number of data-parallel ranks.
    """
    size = min(micro_batch_size, math.ceil(total / world_size))
    if not size:
        return []
    return [
        range(start + rank * size, start + (rank + 1) * size)
        for start in range(0, total, size * world_size)
    ]
