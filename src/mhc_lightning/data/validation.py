"""Which held-out sequences validation uses, and how ranks share them."""

from collections.abc import Sequence

from mhc_lightning.data.order import apportion
from mhc_lightning.data.prepared import VALIDATION, PreparedData
from mhc_lightning.data.sequences import sequences_in


def validation_counts(
    sources: Sequence[PreparedData],
    weights: Sequence[float],
    sequence_length: int,
    wanted: int | None,
) -> list[int]:
    """How many held-out sequences of each source are used.

    Args:
        sources: The prepared folders.
        weights: The sources' weights in training, which ``wanted`` is divided by.
        sequence_length: Tokens to predict per sequence.
        wanted: Number of sequences over all sources; None for all there are.
    """
    available = [
        sum(sequences_in(chunk, sequence_length) for chunk in data.chunks(VALIDATION))
        for data in sources
    ]
    if wanted is None:
        return available
    shares = apportion(wanted, weights)
    return [min(have, int(share)) for have, share in zip(available, shares, strict=True)]


def validation_batches(
    total: int, micro_batch_size: int, rank: int, world_size: int
) -> list[range]:
    """The sequences of each of a rank's batches.

    Every rank gets the same number of batches of the same size and no sequence comes twice, so
    what does not fill a round over all ranks is left out; fewer sequences than one round make one
    smaller round.

    Args:
        total: Number of sequences.
        micro_batch_size: Sequences per batch.
        rank: Data-parallel rank.
        world_size: Number of data-parallel ranks.
    """
    size = min(micro_batch_size, total // world_size)
    if not size:
        return []
    stride = size * world_size
    return [
        range(start, start + size) for start in range(rank * size, total // stride * stride, stride)
    ]
