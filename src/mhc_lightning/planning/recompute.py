"""The cost of recomputing stream operations in backward (arXiv 2512.24880, section 4.3).

Blocks of L_r sub-layers keep the streams at their entry and each sub-layer's output; streams,
aggregates and normalised inputs are rebuilt one block at a time.
"""

from mhc_lightning.modules import Transformer
from mhc_lightning.modules.recompute_size import best_recompute_size
from mhc_lightning.planning.activations import MicroBatch, norm_bytes
from mhc_lightning.planning.stage_part import width_of
from mhc_lightning.planning.sub_layers import places_in_blocks, sub_layers

__all__ = [
    "best_block",
    "best_recompute_size",
    "rebuilt_bytes",
    "rebuilt_for_weights",
    "replayed_bytes",
]


def best_block(model: Transformer) -> int:
    """The L_r of eq. 20 for a model; 0 if its connections cannot be replayed."""
    replayed = [connection for connection, _ in sub_layers(model) if connection.replays]
    return best_recompute_size(len(replayed), replayed[0].num_streams) if replayed else 0


def rebuilt_bytes(model: Transformer, batch: MicroBatch) -> int:
    """Bytes that backward rebuilds for the last recompute block, before it frees any of them.

    They are the streams except those at the entry, the inputs of all sub-layers, and the tensors of
    one norm: norms are rebuilt one at a time.
    """
    places = places_in_blocks(model, batch.recompute_block)
    if places[-1] is None:
        return 0
    size = places[-1] + 1
    vector, one_norm = _vector_and_norm(model, batch)
    return (size - 1) * model.num_streams * vector + size * vector + one_norm


def rebuilt_for_weights(model: Transformer, batch: MicroBatch) -> int:
    """Bytes that the second half of a split backward pass rebuilds; all stay until it ends.

    Tensors that only the first half needs are rebuilt with the rest; no reader frees them.
    """
    vector, one_norm = _vector_and_norm(model, batch)
    return sum(
        (model.num_streams * (place > 0) + 1) * vector + one_norm
        for place in places_in_blocks(model, batch.recompute_block)
        if place is not None
    )


def _vector_and_norm(model: Transformer, batch: MicroBatch) -> tuple[int, int]:
    """Bytes of C values per token, and those that a norm saves and returns beside its input."""
    vector = width_of(model) * batch.precision.activation * batch.tokens
    return vector, norm_bytes(model, batch) + vector


def replayed_bytes(model: Transformer, batch: MicroBatch) -> int:
    """Bytes that rebuilding moves: each block's entry and outputs are read once, by one kernel."""
    value = batch.precision.activation
    widths = 0
    for place in places_in_blocks(model, batch.recompute_block):
        if place is not None:
            # The entry, or an output and the streams that it makes; the input, and its norm.
            widths += model.num_streams + (place > 0) + 1 + 2
    return widths * width_of(model) * value * batch.tokens
