"""What recomputing the stream operations in backward would save (arXiv 2512.24880, section 4.3).

Blocks of L_r sub-layers keep the streams at their entry and each sub-layer's output; streams,
aggregates and normalised inputs are rebuilt one block at a time.
"""

from mhc_lightning.modules import Transformer
from mhc_lightning.modules.recompute_size import recompute_block
from mhc_lightning.planning.activations import (
    MicroBatch,
    connection_bytes,
    norm_bytes,
    saved_for_backward,
    sub_layers,
)

__all__ = ["recompute_block", "saved_with_recompute"]


def saved_with_recompute(
    model: Transformer, batch: MicroBatch, copies_weights: bool, block: int
) -> int:
    """Bytes alive at most between forward and backward with recompute blocks of ``block``."""
    layers = sub_layers(model)
    width = model.embedding.embedding_dim
    vector = width * batch.precision.activation * batch.tokens
    norm = norm_bytes(width, batch, keeps_output=True)
    rebuilt = [connection_bytes(connection, batch).streams + norm for connection, _ in layers]
    kept = sum(saved_for_backward(model, batch, copies_weights).values()) - sum(rebuilt)
    # A connection that keeps no output of its own needs it now, to rebuild what follows.
    kept += sum(vector for connection, _ in layers if connection_bytes(connection, batch)[1] == 0)
    starts = range(0, len(layers), block)
    entries = sum(layers[start][0].num_streams * vector for start in starts)
    return kept + entries + max(sum(rebuilt[start : start + block]) for start in starts)
