"""Replaying by the merge and the aggregation of one implementation, one after the other."""

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from mhc_lightning.kernels.mappings import StreamMappings


def replay_forward(
    merge: ModuleType,
    aggregate: ModuleType,
    entry: Tensor,
    outputs: Sequence[Tensor],
    mappings: Sequence[StreamMappings],
    want_streams: Sequence[bool],
    want_reads: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Streams [T, n, C] and inputs [T, C] of each sub-layer, None where not wanted.

    Args:
        merge: `kernels.merge.reference` or `kernels.merge.compiled`.
        aggregate: `kernels.aggregate.reference` or `kernels.aggregate.compiled`.
        entry: Streams [T, n, C] of the first sub-layer.
        outputs: Outputs [T, C] of all sub-layers but the last.
        mappings: Mappings [T, n], [T, n] and [T, n, n] of each sub-layer.
        want_streams: By sub-layer, True if its streams are wanted; False for the first.
        want_reads: By sub-layer, True if its input is wanted.
    """
    current = entry
    streams: list[Tensor | None] = []
    reads: list[Tensor | None] = []
    last = max((k for k in range(len(mappings)) if want_streams[k] or want_reads[k]), default=-1)
    for k in range(len(mappings)):
        if 0 < k <= last:
            before = mappings[k - 1]
            current = merge.merge_forward(current, outputs[k - 1], before.residual, before.post)
        streams.append(current if want_streams[k] else None)
        read = aggregate.aggregate_forward(current, mappings[k].pre) if want_reads[k] else None
        reads.append(read)
    return streams, reads
