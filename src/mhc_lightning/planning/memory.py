"""Bytes that one device holds at the fullest moment of a training step.

That moment is the end of a forward pass, when the loss is computed: every saved tensor is still
there, and so are the gradients of earlier micro-batches (or of the step before). If backward
rebuilds more than the loss needs, the fullest moment is the rebuilding of the last recompute block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mhc_lightning.kernels.cross_entropy import tokens_per_chunk
from mhc_lightning.modules import Connection, NgramTable, Transformer
from mhc_lightning.planning.activations import MicroBatch, saved_for_backward
from mhc_lightning.planning.recompute import rebuilt_bytes
from mhc_lightning.planning.stage_part import has_head


@dataclass(frozen=True)
class DataParallel:
    """Data parallelism: the number of devices, and the state that each device holds.

    Attributes:
        devices: Number of data-parallel devices.
        sharded: Whether each device holds a shard of weights, gradients and optimizer state (FSDP)
            instead of all of them (DDP, or a single device).
        copies_gradients: Whether gradients are reduced in separate buffers.
    """

    devices: int = 1
    sharded: bool = False
    copies_gradients: bool = False


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes per device, by kind.

    Attributes:
        weights: Parameters and buffers.
        gradients: One per parameter.
        optimizer: State of the optimizer.
        activations: Tensors that the forward pass saves for the backward pass, lower-precision
            copies of weights included.
        logits: Temporary tensors of the loss.
        rebuilt: Temporary tensors of a recompute block, as far as they exceed `logits`.
        communication: Gathered parameters and buffers of collectives.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    rebuilt: int
    communication: int

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
    logits = loss_bytes(model, batch, replicas)
    return DeviceMemory(
        weights=-(-weights // share) + buffers,
        gradients=-(-weights // share),
        optimizer=-(-optimizer // share),
        activations=sum(saved.values()),
        logits=logits,
        rebuilt=max(0, rebuilt_bytes(model, batch) - logits),
        communication=_communication_bytes(model, batch, replicas, weights),
    )


def state_bytes(
    model: Transformer,
    parts: Sequence[Transformer],
    batch: MicroBatch,
    state_per_value: Callable[[nn.Module, nn.Parameter], int],
) -> tuple[int, int, int]:
    """Bytes of parameters, of buffers and of the optimizer's state, for some parts of a model."""
    sizes = {p: size for part in parts for p, size in _parameter_bytes(part, batch).items()}
    optimizer = sum(size * state_per_value(model, p) for p, size in sizes.items())
    buffers = sum(b.numel() * b.element_size() for part in parts for b in part.buffers())
    return sum(sizes.values()), buffers, optimizer


def copies_weights(batch: MicroBatch, replicas: DataParallel) -> bool:
    """True if autocast copies weights; FSDP gathers them in the lower precision instead."""
    return batch.precision.is_mixed and not replicas.sharded


def _parameter_bytes(model: Transformer, batch: MicroBatch) -> dict[nn.Parameter, int]:
    sizes = {}
    for module in model.modules():
        precision = batch.precision
        wide = isinstance(module, Connection | NgramTable)
        size = precision.coefficient if wide else precision.weight
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
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    outside = sum(p.numel() for p in model.parameters()) - sum(blocks)
    # Embedding, norm and head stay gathered. Of the blocks, one computes, one is gathered ahead
    # (with its buffer), and one has gradients and their float32 sum.
    return outside * value + max(blocks) * (4 * value + batch.precision.coefficient)
