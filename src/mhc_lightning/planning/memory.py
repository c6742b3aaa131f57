"""Bytes that one device holds at the fullest moment of a training step.

That moment is the end of a forward pass, when the loss is computed: every saved tensor is still
there, and so are the gradients of earlier micro-batches (or of the step before). If backward
rebuilds more than the loss needs, the fullest moment is the rebuilding of the last recompute block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mhc_lightning.kernels.cross_entropy import tokens_per_chunk
from mhc_lightning.modules import Connection, NgramTable, Transformer
from mhc_lightning.planning.activations import MicroBatch, saved_for_backward
from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.expert_parallel import (
    exchange_buffers,
    on_the_busiest,
    values_on_device,
)
from mhc_lightning.planning.recompute import rebuilt_bytes
from mhc_lightning.planning.row_memory import RowMemory, row_memory
from mhc_lightning.planning.stage_part import has_head
from mhc_lightning.planning.tables import dense_values


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes per device, by kind.

    Attributes:
        weights: Parameters and buffers.
        gradients: One per parameter; of tables, one per row that a step looks up.
        optimizer: State of the optimizer.
        activations: Tensors that the forward pass saves for the backward pass, lower-precision
            copies of weights included.
        logits: Temporary tensors of the loss.
        rebuilt: Temporary tensors of a recompute block, as far as they exceed `logits`.
        communication: Gathered parameters and buffers of collectives, and rows from the host.
        row_update: Temporary tensors of the update of tables, as far as they exceed those of a
            forward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    rebuilt: int
    communication: int
    row_update: int = 0

    @property
    def total(self) -> int:
        """The sum over all kinds."""
        return sum(vars(self).values())


def device_memory(
    model: Transformer,
    batch: MicroBatch,
    replicas: DataParallel,
    state_per_value: Callable[[nn.Module, nn.Parameter], int],
) -> DeviceMemory:
    """Predict the bytes per device.

    Args:
        model: The model; it may be on the meta device.
        batch: The micro-batch of one device.
        replicas: The devices, and the state that each holds.
        state_per_value: Numbers that the optimizer keeps for each value of a parameter of a model.
    """
    weights, buffers, optimizer = state_bytes(model, [model], batch, state_per_value)
    share = replicas.devices if replicas.sharded else 1
    saved = saved_for_backward(model, batch, copies_weights(batch, replicas))
    saved = on_the_busiest(saved, model, replicas.experts)
    logits = loss_bytes(model, batch, replicas)
    memory = DeviceMemory(
        weights=-(-weights // share) + buffers,
        gradients=-(-weights // share),
        optimizer=-(-optimizer // share),
        activations=sum(saved.values()),
        logits=logits,
        rebuilt=max(0, rebuilt_bytes(model, batch) - logits),
        communication=_communication_bytes(model, batch, replicas, weights),
    )
    return with_rows(memory, row_memory(model, batch, replicas))


def with_rows(memory: DeviceMemory, rows: RowMemory) -> DeviceMemory:
    """Add the tables that a device holds."""
    passing = memory.activations + memory.logits + memory.rebuilt
    return replace(
        memory,
        weights=memory.weights + rows.weights,
        gradients=memory.gradients + rows.gradients,
        optimizer=memory.optimizer + rows.optimizer,
        communication=memory.communication + rows.fetched,
        row_update=max(0, rows.update - passing),
    )


def state_bytes(
    model: Transformer,
    parts: Sequence[Transformer],
    batch: MicroBatch,
    state_per_value: Callable[[nn.Module, nn.Parameter], int],
) -> tuple[int, int, int]:
    """Bytes of parameters, of buffers and of the optimizer's state, for some parts of a model.

    Tables of a memory are left out: see `row_memory`.
    """
    sizes = {p: size for part in parts for p, size in _parameter_bytes(part, batch).items()}
    optimizer = sum(size * state_per_value(model, p) for p, size in sizes.items())
    held = {buffer for part in parts for buffer in part.buffers()}
    buffers = sum(b.numel() * b.element_size() for b in held)
    return sum(sizes.values()), buffers, optimizer


def copies_weights(batch: MicroBatch, replicas: DataParallel) -> bool:
    """True if autocast copies weights; FSDP gathers them in the lower precision instead."""
    return batch.precision.is_mixed and not replicas.sharded


def _parameter_bytes(model: Transformer, batch: MicroBatch) -> dict[nn.Parameter, int]:
    sizes = {}
    for module in model.modules():
        precision = batch.precision
        if isinstance(module, NgramTable):
            continue
        size = precision.coefficient if isinstance(module, Connection) else precision.weight
        for parameter in module.parameters(recurse=False):
            sizes[parameter] = parameter.numel() * size
    return sizes


def loss_bytes(model: Transformer, batch: MicroBatch, replicas: DataParallel) -> int:
    """Peak bytes of the loss: logits and log-probabilities of a chunk and its predecessor."""
    if not has_head(model):
        return 0
    vocabulary = model.vocab_size
    rows = min(batch.tokens, tokens_per_chunk(vocabulary))
    value, wide = batch.precision.activation, batch.precision.coefficient
    copy = rows * vocabulary * value if value < wide else 0
    logits = rows * vocabulary * wide
    several = batch.tokens > rows
    peak = 2 * logits + (logits + copy if several else 0)
    weight_product = model.output.weight.numel() * value
    peak = max(peak, logits + copy + weight_product)
    return peak + (weight_product if copies_weights(batch, replicas) else 0)


def _communication_bytes(
    model: Transformer, batch: MicroBatch, replicas: DataParallel, weights: int
) -> int:
    if not replicas.sharded:
        return weights if replicas.copies_gradients and replicas.devices > 1 else 0
    value = torch.bfloat16.itemsize if batch.precision.activation < 4 else batch.precision.weight
    blocks = [values_on_device(block, replicas.experts) for block in model.blocks]
    outside = dense_values(model) - sum(map(dense_values, model.blocks))
    # Embedding, norm and head stay gathered. Of the blocks, one computes, one is gathered ahead
    # (with its buffer), and one has gradients and their float32 sum.
    gathered = outside * value + max(blocks) * (4 * value + batch.precision.coefficient)
    return gathered + exchange_buffers(model, batch, replicas.experts)
