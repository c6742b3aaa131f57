"""The bytes that one micro-batch's forward pass leaves behind for its backward pass.

Read off the code, module by module: what each operator and each ``autograd.Function`` keeps, in
eager execution. Tensors that several operators keep count once. With recompute blocks, streams,
sub-layers' inputs and normalised inputs are rebuilt and not kept. The test of this file counts the
storages that are really kept, so a change to a module that changes them shows there.

Symbols: T tokens of a micro-batch, C width, n streams, H heads, f feed-forward width, E experts of
which k are active.
"""

from collections import Counter
from dataclasses import dataclass
from functools import singledispatch
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mhc_lightning.modules import (
    Connection,
    GatedHyperConnection,
    HyperConnection,
    LatentAttention,
    ManifoldHyperConnection,
    MixtureOfExperts,
    ResidualConnection,
    SwiGLU,
    Transformer,
)
from mhc_lightning.planning.errors import NotPlannableError
from mhc_lightning.planning.parts import has_embedding, has_head, width_of
from mhc_lightning.planning.precision import Precision

KINDS = (
    *("tokens", "connections", "norms", "attention", "feed_forward", "experts", "loss"),
    "weight_copies",
)
_INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class MicroBatch:
    """What one device takes through the model at a time.

    Attributes:
        sequences: Sequences.
        length: Tokens of a sequence.
        precision: Sizes of what is computed.
        fused_norm: Whether RMSNorm is one operator, as on a GPU; on the CPU it is composed of
            several, which keep more.
        recompute_block: Sub-layers per recompute block; 0 if nothing is recomputed.
    """

    sequences: int
    length: int
    precision: Precision
    fused_norm: bool
    recompute_block: int = 0

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.length


def saved_for_backward(
    model: Transformer, batch: MicroBatch, copies_weights: bool
) -> dict[str, int]:
    """Bytes kept between forward and backward, by kind.

    Args:
        model: The model, or a part of one; it may be on the meta device.
        batch: The micro-batch.
        copies_weights: Whether products run on lower-precision copies of the weights, of which
            there are as many for one token as for many.

    Returns:
        Bytes for each of ``KINDS``.

    Raises:
        NotPlannableError: If a sub-layer is of a kind that this file does not know.
    """
    dim = width_of(model)
    saved = Counter(dict.fromkeys(KINDS, 0))
    if has_embedding(model):
        saved["tokens"] = batch.sequences * (batch.length + 1) * _INDEX
    places = places_in_blocks(model, batch.recompute_block)
    for (connection, body), place in zip(sub_layers(model), places, strict=True):
        streams, output, coefficients = connection_bytes(connection, batch)
        norm = norm_bytes(dim, batch, keeps_output=True)
        if place is not None:
            streams = 0 if place > 0 else streams
            norm = norm_statistic_bytes(batch)
        saved["connections"] += streams + output + coefficients
        saved["norms"] += norm
        saved.update(body_bytes(body, batch))
    if has_head(model):
        saved["norms"] += norm_bytes(dim, batch, keeps_output=False)
        # The loss keeps gradients instead of its inputs.
        saved["loss"] = dim * batch.precision.activation * batch.tokens
        saved["loss"] += model.output.weight.numel() * batch.precision.coefficient
    if copies_weights:
        saved["weight_copies"] = copied_weights(model) * batch.precision.activation
    return dict(saved)


def sub_layers(model: Transformer) -> list[tuple[Connection, nn.Module]]:
    """Connection and body (behind the pre-norm) of every sub-layer, in order."""
    found = []
    for block in model.blocks:
        for name in ("attention", "feed_forward"):
            connection = block.get_submodule(f"{name}_connection")
            assert isinstance(connection, Connection)
            found.append((connection, block.get_submodule(f"{name}.body")))
    return found


def places_in_blocks(model: Transformer, size: int) -> list[int | None]:
    """Each sub-layer's place in its recompute block; None where nothing is recomputed."""
    places: list[int | None] = []
    for connection, _ in sub_layers(model):
        before = places[-1] if places else None
        if size == 0 or not connection.replays:
            places.append(None)
        else:
            places.append(0 if before is None else (before + 1) % size)
    return places


def copied_weights(model: Transformer) -> int:
    """Parameters that mixed precision keeps a lower-precision copy of during a forward pass."""
    left_out = sum(
        p.numel()
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if isinstance(module, Connection | nn.Embedding)
    )
    routers = sum(
        module.router.weight.numel()
        for module in model.modules()
        if isinstance(module, MixtureOfExperts)
    )
    everything = sum(p.numel() for p in model.parameters())
    head = model.output.weight.numel() if has_head(model) else 0
    return everything - left_out - routers - head


def norm_bytes(width: int, batch: MicroBatch, keeps_output: bool, input_width: int = 0) -> int:
    """Bytes that an RMSNorm keeps: its input, one statistic per token, and perhaps its output.

    Args:
        width: Values per token.
        batch: The micro-batch.
        keeps_output: Whether what follows keeps the output.
        input_width: Values per token of the tensor that the input is a part of, if it is one.
    """
    value = batch.precision.activation
    wide = max(4, value)
    if batch.fused_norm:
        kept = (input_width or width) * value
    elif value < wide:
        kept = 2 * width * wide  # the input taken to float32, and the same normalised
    else:
        kept = ((input_width or width) + width) * value
    kept += width * value if keeps_output else 0
    return kept * batch.tokens + norm_statistic_bytes(batch)


def norm_statistic_bytes(batch: MicroBatch) -> int:
    """Bytes of what an RMSNorm divides by, one number per token."""
    return max(4, batch.precision.activation) * batch.tokens


class ConnectionBytes(NamedTuple):
    """Bytes that a connection keeps.

    Attributes:
        streams: Its input, in whatever precisions; recomputation can rebuild them.
        output: The sub-layer's output.
        coefficients: Mappings and what their gradient needs.
    """

    streams: int
    output: int
    coefficients: int


@singledispatch
def connection_bytes(connection: nn.Module, batch: MicroBatch) -> ConnectionBytes:
    """Bytes that a connection keeps beside what the sub-layer keeps."""
    raise TypeError(f"{type(connection).__name__} is not a Connection")


@connection_bytes.register
def _(connection: Connection, batch: MicroBatch) -> ConnectionBytes:
    """Any connection that reads by ``aggregate_streams`` and writes by ``merge_streams``."""
    return _connection_bytes(connection, batch, _num_mappings(connection))


@connection_bytes.register
def _(connection: GatedHyperConnection, batch: MicroBatch) -> ConnectionBytes:
    """``read_streams`` keeps what mHC's does, but for the matrices: ``mix`` keeps its own."""
    gates = 2 * connection.num_streams
    numbers = len(connection.bias) + 1 + gates + kept_by_mix(connection)
    return _connection_bytes(connection, batch, numbers)


@connection_bytes.register
def _(connection: ManifoldHyperConnection, batch: MicroBatch) -> ConnectionBytes:
    """``read_streams`` keeps the raw coefficients, the norm and the mappings."""
    return _connection_bytes(connection, batch, 2 * _num_mappings(connection) + 1)


@connection_bytes.register
def _(connection: HyperConnection, batch: MicroBatch) -> ConnectionBytes:
    """Static mappings are parameters; dynamic ones keep what ``read_hyper_streams`` does."""
    if connection.phi is None:
        return _connection_bytes(connection, batch, 0)
    norms = connection.num_streams
    return _connection_bytes(connection, batch, 2 * _num_mappings(connection) + norms)


@connection_bytes.register
def _(connection: ResidualConnection, batch: MicroBatch) -> ConnectionBytes:
    """Adding keeps nothing, and the sub-layer's norm keeps the stream."""
    return ConnectionBytes(0, 0, 0)


_kept_by_mix: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def kept_by_mix(connection: GatedHyperConnection) -> int:
    """Numbers per token that ``mix`` keeps for backward, its result among them: counted, once."""

    def kept(tokens: int) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)  # so that no address is used twice
            return tensor

        held: list[Tensor] = []
        logits = torch.zeros(tokens, count, device="cpu", requires_grad=True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            keep(connection.mix(logits).detach())
        return sum(sizes.values()) // logits.itemsize

    count = len(connection.bias) - 2 * connection.num_streams
    if connection not in _kept_by_mix:
        _kept_by_mix[connection] = kept(2) - kept(1)
    return _kept_by_mix[connection]


def _num_mappings(connection: Connection) -> int:
    return connection.num_streams * (connection.num_streams + 2)


def _connection_bytes(connection: Connection, batch: MicroBatch, numbers: int) -> ConnectionBytes:
    # The first connection gets n views of one embedding.
    streams = connection.num_streams if connection.layer_index > 0 else 1
    vector = connection.dim * batch.precision.activation * batch.tokens
    return ConnectionBytes(
        streams * vector, vector, numbers * batch.precision.coefficient * batch.tokens
    )


@singledispatch
def body_bytes(body: nn.Module, batch: MicroBatch) -> dict[str, int]:
    """Bytes by kind that what follows a sub-layer's norm keeps beside its input."""
    raise NotPlannableError(f"what {type(body).__name__} keeps for backward is not known")


@body_bytes.register
def _(body: LatentAttention, batch: MicroBatch) -> dict[str, int]:
    """Latent and its norm; cosines and sines; queries, keys, padded values and mixture."""
    heads, width, rope = body.num_heads, body.head_dim, body.rope_dim
    value = batch.precision.activation
    products = heads * (4 * (width + rope) + width) * value
    log_sums = heads * max(4, value)
    angles = 2 * batch.length * rope * 4
    return {
        "norms": norm_bytes(body.kv_rank, batch, True, input_width=body.kv_rank + rope),
        "attention": (products + log_sums) * batch.tokens + angles,
    }


@body_bytes.register
def _(body: SwiGLU, batch: MicroBatch) -> dict[str, int]:
    """Gate and up, silu of the gate, and the product: 4f per token."""
    return {"feed_forward": 4 * body.down.in_features * batch.precision.activation * batch.tokens}


@body_bytes.register
def _(body: MixtureOfExperts, batch: MicroBatch) -> dict[str, int]:
    """The router in float32, k sorted copies of each token, and k times 4f."""
    active, value = body.num_active_experts, batch.precision.activation
    expert_dim, width = body.down.shape[1:]
    router = body.num_experts * 4 + active * 4 + 4 + active * value + 3 * active * _INDEX
    once = body.num_experts * 4
    if value != 4:
        router += width * 4
    if batch.precision.weight != 4:
        once += body.router.weight.numel() * 4
    routed = active * (2 * width + 4 * expert_dim) * value
    saved = {"experts": (router + routed) * batch.tokens + once}
    return saved if body.shared is None else saved | body_bytes(body.shared, batch)
