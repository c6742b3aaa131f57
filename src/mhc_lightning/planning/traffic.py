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
        forward_fused: Forward, with projection, read and merge as one kernel each.
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
    vector = width_of(model) * model.num_streams * precision.activation
    for _ in memories(model):
        # The gate reads the streams, and the sum reads and writes them; as one kernel they are read
        # once. Backward reads streams and gradients, and writes these.
        counts = (4 * vector, 2 * vector, 5 * vector)
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
    return StreamTraffic(*totals)
