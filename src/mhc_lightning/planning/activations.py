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
from typing import Any

import torch
from torch import Tensor, nn

from mhc_lightning.modules import LatentAttention, MixtureOfExperts, Transformer
from mhc_lightning.modules.memory import BlockMemory
from mhc_lightning.modules.memory.memory import INPUT
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
from mhc_lightning.planning.sub_layers import SubLayer, memories, places_in_blocks, sub_layers
from mhc_lightning.planning.tables import ngram_tables, rows_per_token

TOKENS, MEMORY, CONNECTIONS, LOSS = "tokens", "memory", "connections", "loss"
KINDS = (
    *(TOKENS, MEMORY, CONNECTIONS, NORMS, "attention", "feed_forward", "experts", LOSS),
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
    passed = handed_on(model, batch)
    in_buffers = len(passed) if receives else 0  # of what is passed, from the last one back
    if has_embedding(model):
        in_buffers = 0
        kept = _kept_by_embedding(model, batch)
        saved.update(kept.sizes)
        passed = kept.leaving
    if ngram_tables(model):
        saved[MEMORY] += _recalled(model, batch).nbytes
    for step in _steps(model, batch):
        kept = step(passed)
        taken, rest = passed[: len(kept.entered)], passed[len(kept.entered) :]
        own = len(passed) - in_buffers
        saved.update(_between(taken[:own], kept.entered[:own]))
        saved.update(kept.sizes)
        passed, in_buffers = (*kept.leaving, *rest), min(in_buffers, len(rest))
    saved.update(_between(passed, [CONNECTIONS if sends else ""] * len(passed)))
    if not copies_weights:
        saved[WEIGHT_COPIES] = 0
    return dict(saved)


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


def _recalled(model: Transformer, batch: MicroBatch) -> Passed:
    """The rows that a memory names, for all of its tables: they are kept as one tensor."""
    layout = model.memory.hash.layout  # type: ignore[union-attr]  # there are tables
    size = len(layout.tables), batch.sequences, batch.length, layout.heads
    return contiguous(size, torch.int64)


def _steps(model: Transformer, batch: MicroBatch) -> list[Callable[[Sequence[Passed]], Kept]]:
    """The parts behind the embedding: each takes the first tensors handed on, and counts."""
    steps: list[Callable[[Sequence[Passed]], Kept]] = []
    group: list[SubLayer] = []
    changed, size = memories(model), batch.recompute_block
    places = places_in_blocks(model, size)
    for number, (each, place) in enumerate(zip(sub_layers(model), places, strict=True)):
        if not place:
            # A recompute block; each sub-layer by itself where nothing is recomputed.
            group = []
            if number in changed:
                steps.append(partial(_kept_by_memory, changed[number], batch))
            steps.append(partial(_kept_by_sub_layers, group, batch))
        group.append(each)
    if has_head(model):
        steps.append(partial(_kept_by_head, model, batch))
    return steps


def _between(passed: Sequence[Passed], kept_as: Sequence[str]) -> Counter[str]:
    """Bytes of the tensors between parts, by the part that makes or reads them."""
    sizes = Counter[str]()
    for each, kind in zip(passed, kept_as, strict=True):
        if each.kept_as or kind:
            sizes[each.kept_as or kind] += each.nbytes
    return sizes


def _kept_by_embedding(model: Transformer, batch: MicroBatch) -> Kept:
    def run(shell: Any, keeping: Keeping, tokens: Tensor, *rows: Tensor) -> tuple[Tensor]:
        recalled = {INPUT: rows[0][0]} if rows else {}
        return (shell.embed(tokens[:, :-1], recalled),)

    remembers = model.input_memory is not None
    tokens = contiguous((batch.sequences, batch.length + 1), torch.int64)
    entering = [tokens, *([_recalled(model, batch)] if remembers else [])]
    kind = MEMORY if remembers else TOKENS
    kept = _counted(_shell(model, model.parts_before_blocks), run, entering, kind, batch)
    tokens_kept = _between([tokens], [TOKENS if kept.entered[0] else ""])
    return kept._replace(sizes=kept.sizes | dict(tokens_kept))


def _kept_by_memory(memory: BlockMemory, batch: MicroBatch, passed: Sequence[Passed]) -> Kept:
    """The tensors of a memory that changes the streams; the rows that it is told are not its."""

    def run(memory: Any, keeping: Keeping, streams: Tensor, rows: Tensor) -> tuple[Tensor]:
        return (memory(streams, {memory.block: rows}),)

    (table,) = ngram_tables(memory)
    rows = contiguous((batch.sequences, batch.length, rows_per_token(table)), torch.int64)
    kept = _counted(memory, run, [passed[0], rows], MEMORY, batch)
    return kept._replace(entered=kept.entered[:1])


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
