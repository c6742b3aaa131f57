"""The bytes that the first half of a split backward pass saves for the second.

The first half takes the gradients of inputs (`stage_backward_input` of torch's pipelining). For
each operator with weights it saves the gradient of the result, from which the second half takes the
weights' gradients. The tensors of the forward pass stay as well.
"""

from functools import singledispatch

from torch import nn

from mhc_lightning.modules import LatentAttention, MixtureOfExperts, SwiGLU, Transformer
from mhc_lightning.modules.memory import BlockMemory
from mhc_lightning.modules.memory.engram import EngramBlock
from mhc_lightning.planning.activations import MicroBatch
from mhc_lightning.planning.errors import NotPlannableError
from mhc_lightning.planning.stage_part import has_embedding, has_head, width_of
from mhc_lightning.planning.sub_layers import memories, sub_layers
from mhc_lightning.planning.tables import rows_per_token


def gradients_for_weights(part: Transformer, batch: MicroBatch) -> int:
    """Bytes of the gradients that wait for weights' gradients, for one micro-batch.

    It is 0 on the first stage: no gradient of its input is needed, and torch runs its whole
    backward pass in the second half.
    """
    if has_embedding(part):
        return 0
    value, dim = batch.precision.activation, width_of(part)
    # A norm's weight multiplies in float32 where the norm is composed of several operators.
    norm = dim * (value if batch.fused_norm else max(4, value))
    per_token = norm if has_head(part) else 0
    for each in sub_layers(part):
        connection, body = each.connection, each.body
        if next(connection.parameters(), None) is not None:
            # The merge of the previous sub-layer, and the read of this sub-layer.
            per_token += (connection.num_streams + 1) * dim * value
        per_token += norm + values_behind_weights(body) * value
    per_token += sum(_bytes_behind_memory(each, batch) for each in memories(part).values())
    return per_token * batch.tokens


def _bytes_behind_memory(memory: BlockMemory, batch: MicroBatch) -> int:
    """Bytes per token in front of a memory's weights: rows, gates, keys, value, streams."""
    if not isinstance(memory, EngramBlock):
        raise NotPlannableError(
            f"what {type(memory).__name__} keeps in a split backward pass is not known"
        )
    wide, value = batch.precision.coefficient, batch.precision.activation
    streams = memory.num_streams * memory.dim
    rows = rows_per_token(memory.table) * memory.table.width + memory.num_streams
    # The gates pass the streams on. The convolution's taps wait for the same gradient as these.
    return rows * wide + (2 * streams + memory.dim) * value


@singledispatch
def values_behind_weights(body: nn.Module) -> int:
    """Numbers per token in the results of a sub-layer's matrix products."""
    raise NotPlannableError(
        f"what {type(body).__name__} keeps in a split backward pass is not known"
    )


@values_behind_weights.register
def _(body: LatentAttention) -> int:
    """The four products, and the norm of the latent."""
    products = (body.query, body.latent, body.key_value, body.output)
    return sum(product.out_features for product in products) + body.kv_rank


@values_behind_weights.register
def _(body: SwiGLU) -> int:
    """Gate and up, and the output."""
    return 2 * body.down.in_features + body.down.out_features


@values_behind_weights.register
def _(body: MixtureOfExperts) -> int:
    """The router, and the products of each active expert."""
    expert_dim, width = body.down.shape[1:]
    routed = body.num_experts + body.num_active_experts * (2 * expert_dim + width)
    return routed + (0 if body.shared is None else values_behind_weights(body.shared))
