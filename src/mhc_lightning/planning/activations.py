"""Activation memory: the bytes that a micro-batch's forward pass saves for its backward pass.

The modules themselves are counted: embedding, sub-layers and head each run on tensors without
values (`saved_tensors.py`). A tensor that one module hands to the next is counted once, by the
module that saves it. Equal sub-layers run once. A recompute block runs as a whole.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhc_lightning.modules import Connection, LatentAttention, MixtureOfExperts, Transformer
from mhc_lightning.modules.recompute import recomputing
from mhc_lightning.planning.precision import Precision
from mhc_lightning.planning.saved_tensors import (
    NORMS,
    WEIGHT_COPIES,
    Keeping,
    Kept,
    Passed,
    contiguous,
    kept_by,
    likeness,
)
from mhc_lightning.planning.stage_part import has_embedding, has_head, width_of

TOKENS, CONNECTIONS, LOSS = "tokens", "connections", "loss"
KINDS = (
    *(TOKENS, CONNECTIONS, NORMS, "attention", "feed_forward", "experts", LOSS),
    WEIGHT_COPIES,
)


@dataclass(frozen=True)
class MicroBatch:
    """The sequences that one device computes at a time, and the settings of that computation.

    Attributes:
        sequences: Number of sequences.
        length: Tokens of a sequence.
        precision: Sizes of computed values.
        fused_norm: Whether RMSNorm is one operator, as on a GPU; on the CPU it is composed of
            several operators, which save more.
        recompute_block: Sub-layers per recompute block; 0 if nothing is recomputed.
    """

    sequences: int
    length: int
    precision: Precision
    fused_norm: bool
    recompute_block: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch, T."""
        return self.sequences * self.length


class SubLayer(NamedTuple):
    """One sub-layer of a network.

    Attributes:
        connection: Its residual connection.
        layer: The pre-norm and the body that the connection surrounds.
    """

    connection: Connection
    layer: nn.Module

    @property
    def body(self) -> nn.Module:
        """Attention or feed-forward."""
        return self.layer.get_submodule("body")


def saved_for_backward(
    model: Transformer,
    batch: MicroBatch,
    copies_weights: bool,
    *,
    receives: bool = False,
    sends: bool = False,
) -> dict[str, int]:
    """Bytes kept between forward and backward, by kind.

    A tensor counts towards the part that saves it first: its input towards a norm, the norm's
    output towards a sub-layer, the streams and the sub-layer's output towards a connection.

    Args:
        model: The model, or a part of one; it may be on the meta device.
        batch: The micro-batch.
        copies_weights: Whether products run on lower-precision copies of the weights. Their size
            does not depend on the number of tokens.
        receives: Whether the streams that enter a part without the embedding lie in receive
            buffers, which are not counted.
        sends: Whether the streams that leave a part without the head are sent, and so stay until
            its backward pass.

    Returns:
        Bytes for each of `KINDS`.

    Raises:
        NotPlannableError: If a part of the model cannot run on tensors without values.
    """
    saved = Counter(dict.fromkeys(KINDS, 0))
    passed, in_buffers = handed_on(model, batch), receives
    if has_embedding(model):
        in_buffers = False
        kept = _kept_by_embedding(model, batch)
        saved.update(kept.sizes)
        passed = kept.leaving
    steps: list[Callable[[Sequence[Passed]], Kept]] = [
        partial(_kept_by_sub_layers, group, batch)
        for group in _in_blocks(model, batch.recompute_block)
    ]
    if has_head(model):
        steps.append(partial(_kept_by_head, model, batch))
    for step in steps:
        kept = step(passed)
        if not in_buffers:
            saved.update(_between(passed, kept.entered))
        saved.update(kept.sizes)
        passed, in_buffers = kept.leaving, False
    saved.update(_between(passed, [CONNECTIONS if sends else ""] * len(passed)))
    if not copies_weights:
        saved[WEIGHT_COPIES] = 0
    return dict(saved)


def sub_layers(model: Transformer) -> list[SubLayer]:
    """Every sub-layer, in order."""
    found = []
    for block in model.blocks:
        for name in ("attention", "feed_forward"):
            connection = block.get_submodule(f"{name}_connection")
            assert isinstance(connection, Connection)
            found.append(SubLayer(connection, block.get_submodule(name)))
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


def norm_bytes(model: Transformer, batch: MicroBatch) -> int:
    """Bytes that the norm before a sub-layer keeps, beside its input and one number per token."""

    def run(norm: nn.Module, keeping: Keeping, x: Tensor) -> tuple[Tensor]:
        return (norm(x),)

    precision = batch.precision
    norm = sub_layers(model)[0].layer.get_submodule("norm")
    entering = contiguous((batch.tokens, width_of(model)), precision.activation_dtype)
    kept = _counted(norm, run, [entering], NORMS, batch)
    return kept.sizes.get(NORMS, 0) - max(4, precision.activation) * batch.tokens


def handed_on(model: Transformer, batch: MicroBatch) -> tuple[Passed, ...]:
    """The streams, and their carry if there is one, that a block hands to the next."""
    size = batch.sequences, batch.length, model.num_streams, sub_layers(model)[0].connection.dim
    streams = contiguous(size, batch.precision.activation_dtype)
    carry = model.carry_like(torch.empty(size, dtype=streams.dtype, device="meta"))
    return (streams,) if carry is None else (streams, contiguous(carry.shape, carry.dtype))


def _in_blocks(model: Transformer, size: int) -> list[tuple[SubLayer, ...]]:
    """Sub-layers by recompute block; each by itself where nothing is recomputed."""
    groups: list[tuple[SubLayer, ...]] = []
    for each, place in zip(sub_layers(model), places_in_blocks(model, size), strict=True):
        if place:
            groups[-1] = (*groups[-1], each)
        else:
            groups.append((each,))
    return groups


def _between(passed: Sequence[Passed], kept_as: Sequence[str]) -> Counter[str]:
    """Bytes of the tensors between parts, by the part that makes or reads them."""
    sizes = Counter[str]()
    for each, kind in zip(passed, kept_as, strict=True):
        if each.kept_as or kind:
            sizes[each.kept_as or kind] += each.nbytes
    return sizes


def _kept_by_embedding(model: Transformer, batch: MicroBatch) -> Kept:
    def run(shell: Any, keeping: Keeping, tokens: Tensor) -> tuple[Tensor]:
        return (shell.embed(tokens[:, :-1]),)

    tokens = contiguous((batch.sequences, batch.length + 1), torch.int64)
    kept = _counted(_shell(model, model.parts_before_blocks), run, [tokens], TOKENS, batch)
    return kept._replace(sizes=kept.sizes | dict(_between([tokens], kept.entered)))


def _kept_by_sub_layers(
    group: Sequence[SubLayer], batch: MicroBatch, entering: Sequence[Passed]
) -> Kept:
    def run(
        modules: Any, keeping: Keeping, streams: Tensor, carry: Tensor | None = None
    ) -> Sequence[Tensor]:
        flow: Any = streams
        with recomputing(batch.recompute_block):
            for connection, layer in zip(modules[::2], modules[1::2], strict=True):
                flow = connection.run(flow, partial(apply, layer, keeping), carry)
                carry = None
            streams, carry = flow.merge()
        return (streams,) if carry is None else (streams, carry)

    def apply(layer: nn.Module, keeping: Keeping, x: Tensor) -> Tensor:
        with keeping.counted_as(_kind_of(layer.get_submodule("body"))):
            return layer(x)

    modules = nn.ModuleList(module for each in group for module in each)
    return _counted(modules, run, entering, CONNECTIONS, batch, batch.recompute_block)


def _kind_of(body: nn.Module) -> str:
    if isinstance(body, LatentAttention):
        return "attention"
    return "experts" if isinstance(body, MixtureOfExperts) else "feed_forward"


def _kept_by_head(model: Transformer, batch: MicroBatch, entering: Sequence[Passed]) -> Kept:
    """The head's tensors, extrapolated from two and three tokens: it is linear in the tokens."""

    def run(
        shell: Any, keeping: Keeping, streams: Tensor, carry: Tensor | None = None
    ) -> Sequence[Tensor]:
        shell.head_loss(streams, carry, torch.zeros(streams.shape[:2], dtype=torch.int64))
        return ()

    def of_tokens(count: int) -> Kept:
        few = [contiguous((1, count, *each.size[2:]), each.dtype) for each in entering]
        return _counted(shell, run, few, LOSS, batch)

    shell = _shell(model, model.parts_behind_blocks)
    two, three = of_tokens(2), of_tokens(3)
    each = {kind: three.sizes[kind] - size for kind, size in two.sizes.items()}
    sizes = {kind: size + (batch.tokens - 2) * each[kind] for kind, size in two.sizes.items()}
    return two._replace(sizes=sizes)


def _shell(model: Transformer, names: Sequence[str]) -> Transformer:
    """A copy of a network that has only some of its submodules."""
    shell = copy.copy(model)
    shell._modules = {name: model._modules[name] for name in names}
    return shell


_known: dict[tuple, Kept] = {}


def _counted(
    module: nn.Module,
    run: Callable[..., Sequence[Tensor]],
    entering: Sequence[Passed],
    kind: str,
    batch: MicroBatch,
    recompute_block: int = 0,
) -> Kept:
    """`kept_by`, run once for equal modules under equal conditions."""
    rest = tuple(entering), kind, batch.precision, batch.fused_norm
    key = likeness(module), *rest, recompute_block
    if key not in _known:
        _known[key] = kept_by(module, run, *rest)
    return _known[key]
