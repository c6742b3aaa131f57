"""Bytes that the stream operations of sub-layers and memories read and write per token.

The element counts are those of arXiv 2512.24880, Table 2, and of its fused kernels. Backward is
counted the same way: each operation reads its operands and writes its results once.
"""

from typing import NamedTuple

from mhc_lightning.modules import ResidualConnection, Transformer
from mhc_lightning.planning.precision import Precision
from mhc_lightning.planning.stage_part import width_of
from mhc_lightning.planning.sub_layers import memories, sub_layers


class StreamTraffic(NamedTuple):
    """Bytes per token, read and written, over all sub-layers and memories of blocks.

    Attributes:
        forward_unfused: Forward, one operation at a time (Table 2).
        forward_fused: Forward, with projection, read and merge, and a memory's gates and its write
            to the streams, as one kernel each.
        training_fused: Forward and backward, with those kernels.
    """

    forward_unfused: int
    forward_fused: int
    training_fused: int


def stream_traffic(model: Transformer, precision: Precision) -> StreamTraffic:
    """Count a model's stream traffic."""
    totals = [0, 0, 0]
    for connection, _ in sub_layers(model):
        vector = connection.dim * precision.activation
        n = connection.num_streams
        if isinstance(connection, ResidualConnection):
            # x + y; in backward two gradients meet.
            counts = (3 * vector, 3 * vector, 6 * vector)
        else:
            coefficients = 2 * n * (n + 2) * precision.coefficient
            counts = (
                (8 * n + 2) * vector + coefficients,
                (4 * n + 2) * vector,
                # Forward: project n, read n + 1, merge 2n + 1; backward: 2n, 2n + 1, 3n + 2.
                (11 * n + 5) * vector,
            )
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
    vector, n = width_of(model) * precision.activation, model.num_streams
    for _ in memories(model):
        counts = (
            # Gates read streams and keys; a product (n + 1) and a sum (3n) follow.
            (6 * n + 1) * vector,
            (4 * n + 1) * vector,
            # Forward: gates 2n, write 2n + 1; backward: write n + 2, gates 5n.
            (10 * n + 3) * vector,
        )
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
    return StreamTraffic(*totals)
