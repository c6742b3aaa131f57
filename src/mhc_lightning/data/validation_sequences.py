"""Which held-out sequences validation uses, and how ranks share them."""

import math
from collections.abc import Sequence

from mhc_lightning.data.prepared_data import PreparedData
from mhc_lightning.data.prepared_record import VALIDATION
from mhc_lightning.data.shuffling import apportion
from mhc_lightning.data.training_sequences import held_out_sequences_in


def validation_counts(
    sources: Sequence[PreparedData],
    weights: Sequence[float],
    sequence_length: int,
    wanted: int | None,
) -> list[int]:
    """How many held-out sequences of each source are used; those at chunks' ends may be shorter.

    Args:
        sources: The prepared folders.
        weights: The sources' weights in training, which ``wanted`` is divided by.
        sequence_length: Tokens to predict per sequence.
        wanted: Number of sequences over all sources; None for all there are.
    """
    available = [
        sum(held_out_sequences_in(chunk, sequence_length) for chunk in data.chunks(VALIDATION))
        for data in sources
    ]
    if wanted is None:
        return available
    shares = apportion(wanted, weights)
    return [min(have, int(share)) for have, share in zip(available, shares, strict=True)]


def validation_batches(
    total: int, micro_batch_size: int, rank: int, world_size: int
) -> list[range]:
    """The sequences of each of a rank's batches: each comes once, on one rank.

    Every rank gets the same number of batches of the same size, as collectives need it. What is
    missing to that is numbered from ``total`` on, and stands for padding. Fewer sequences than one
    round over all ranks make a smaller one.

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
