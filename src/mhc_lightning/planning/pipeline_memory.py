"""Bytes that each device of a pipeline holds at the fullest moment of a training step.

The actions of each device are followed in the order of the schedule: a forward pass adds the
tensors that its stage saves, the end of its backward pass frees them. The receive buffers of
torch's engine are there all the time: one for each micro-batch and boundary, forward and backward
(torch 2.13). The input of a stage is such a buffer, and is not saved a second time. The output of a
stage stays until its backward pass.

A split backward pass frees nothing before the weights' gradients are done; its first half adds the
gradients that the second half needs. The gradient handed back stays until the step ends.

Not counted: the buffers of validation, and tensors that a transfer under way keeps alive.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from mhc_lightning.modules import Transformer
from mhc_lightning.planning.activations import (
    KINDS,
    MicroBatch,
    handed_on,
    saved_for_backward,
)
from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.expert_parallel import (
    exchange_buffers,
    on_the_busiest,
    values_on_device,
)
from mhc_lightning.planning.memory import (
    DeviceMemory,
    copies_weights,
    loss_bytes,
    state_bytes,
    with_rows,
)
from mhc_lightning.planning.recompute import rebuilt_bytes, rebuilt_for_weights
from mhc_lightning.planning.row_memory import RowMemory, row_memory, together
from mhc_lightning.planning.schedule_order import PassKind, Slot, in_flight, schedule_order
from mhc_lightning.planning.split_backward import gradients_for_weights
from mhc_lightning.planning.stage_part import part_of
from mhc_lightning.planning.stages import StagePlan


@dataclass(frozen=True)
class PipelineDevice:
    """The bytes that one device of a pipeline holds.

    Attributes:
        device: Number of the device in the pipeline, from 0.
        stages: Stages that the device holds.
        blocks: Number of blocks in these stages.
        in_flight: Largest number of forward passes that wait for their backward pass.
        memory: Bytes at the device's fullest moment.
        activations: Bytes saved by forward passes, by kind.
        rows: The part of a memory's tables in these bytes.
    """

    device: int
    stages: tuple[int, ...]
    blocks: int
    in_flight: int
    memory: DeviceMemory
    activations: dict[str, int]
    rows: RowMemory


_WAITING, _COPIES = "gradients_for_weights", "weight_copies"


class _Stage(NamedTuple):
    """Bytes for one micro-batch on a stage."""

    saved: dict[str, int]
    copies: int  # of weights, for all micro-batches of a step together
    waiting: int  # from the first half of a backward pass to the second
    handed_back: int  # from the first half on
    logits: int
    rebuilt: int
    rebuilt_for_weights: int


def pipeline_memory(
    model: Transformer,
    plan: StagePlan,
    micro_batches: int,
    batch: MicroBatch,
    replicas: DataParallel,
    state_per_value: Callable[[nn.Module, nn.Parameter], int],
) -> list[PipelineDevice]:
    """Predict the bytes of each device of a pipeline.

    Args:
        model: The whole model; it may be on the meta device.
        plan: The stages, and the device of each.
        micro_batches: Micro-batches that a batch is cut into.
        batch: One micro-batch.
        replicas: The pipelines that share each stage's state.
        state_per_value: Numbers that the optimizer keeps for each value of a parameter of a model.
    """
    parts = [part_of(model, blocks) for blocks in plan.blocks]
    boundary = boundary_bytes(model, batch)
    every = [_saved(parts, index, batch, replicas, plan) for index in range(len(parts))]
    # Autocast copies weights once a step, unless backward passes are split in halves.
    shares = not plan.kind.splits_backward
    stages = [
        _Stage(
            saved={**every[index], **({_COPIES: 0} if shares else {})},
            copies=every[index].get(_COPIES, 0) if shares else 0,
            waiting=gradients_for_weights(part, batch),
            handed_back=boundary if index and _sends(plan, index, index - 1) else 0,
            logits=loss_bytes(part, batch, replicas),
            rebuilt=rebuilt_bytes(part, batch),
            rebuilt_for_weights=rebuilt_for_weights(part, batch),
        )
        for index, part in enumerate(parts)
    ]
    devices = []
    for device, slots in enumerate(schedule_order(plan, micro_batches)):
        held = plan.stages_of(device)
        own = [parts[stage] for stage in held]
        ends = sum((stage > 0) + (stage < len(parts) - 1) for stage in held)
        fullest, kinds = _fullest(slots, stages)
        weights, buffers, optimizer = state_bytes(model, own, batch, state_per_value)
        share = replicas.devices if replicas.sharded else 1
        rows = together(row_memory(part, batch, replicas) for part in own)
        devices.append(
            PipelineDevice(
                device=device,
                stages=tuple(held),
                blocks=sum(len(plan.blocks[stage]) for stage in held),
                in_flight=in_flight(slots),
                memory=with_rows(
                    replace(
                        fullest,
                        weights=-(-weights // share) + buffers,
                        gradients=-(-weights // share),
                        optimizer=-(-optimizer // share),
                        communication=fullest.communication
                        + ends * micro_batches * boundary
                        + _gathered_bytes(own, batch, replicas),
                    ),
                    rows,
                ),
                activations=kinds,
                rows=rows,
            )
        )
    return devices


def _sends(plan: StagePlan, stage: int, other: int) -> bool:
    return plan.device_of(stage) != plan.device_of(other)


def boundary_bytes(model: Transformer, batch: MicroBatch) -> int:
    """Bytes that cross a boundary between stages: n·C values per token, and their carry."""
    return sum(tensor.nbytes for tensor in handed_on(model, batch))


def _saved(
    parts: list[Transformer],
    index: int,
    batch: MicroBatch,
    replicas: DataParallel,
    plan: StagePlan,
) -> dict[str, int]:
    """Bytes that a stage's forward pass saves for one micro-batch, by kind."""
    sends = index < len(parts) - 1 and _sends(plan, index, index + 1)
    copies = copies_weights(batch, replicas)
    saved = saved_for_backward(parts[index], batch, copies, receives=True, sends=sends)
    return on_the_busiest(saved, parts[index], replicas.experts)


def _fullest(slots: tuple[Slot, ...], stages: list[_Stage]) -> tuple[DeviceMemory, dict[str, int]]:
    """The temporary bytes at their fullest moment, and activations by kind."""
    held, halves, split = Counter[int](), Counter[int](), Counter[int]()
    sizes = [sum(stage.saved.values()) for stage in stages]
    most, best, counts = -1, DeviceMemory(*[0] * 7), (Counter[int](), Counter[int]())
    for kind, stage, _ in (action for slot in slots for action in slot):
        forward, second = kind is PassKind.FORWARD, kind is PassKind.BACKWARD_WEIGHT
        held[stage] += forward
        halves[stage] += kind is PassKind.BACKWARD_INPUT
        split[stage] += kind is PassKind.BACKWARD_INPUT
        kept = sum(count * sizes[index] + stages[index].copies for index, count in held.items())
        kept += sum(count * stages[index].waiting for index, count in halves.items())
        back = sum(count * stages[index].handed_back for index, count in split.items())
        # The first stage takes its whole backward pass in the second half.
        again = stages[stage].rebuilt_for_weights if second and stage else stages[stage].rebuilt
        logits, rebuilt = (stages[stage].logits, 0) if forward else (0, again)
        if kept + back + logits + rebuilt > most:
            most = kept + back + logits + rebuilt
            best = replace(
                best, activations=kept, logits=logits, rebuilt=rebuilt, communication=back
            )
            counts = Counter(held), Counter(halves)
        held[stage] -= second or kind is PassKind.BACKWARD
        halves[stage] -= second
    kinds = {
        kind: sum(count * stages[index].saved[kind] for index, count in counts[0].items())
        for kind in KINDS
    }
    kinds[_COPIES] += sum(stages[index].copies for index in counts[0])
    kinds[_WAITING] = sum(count * stages[index].waiting for index, count in counts[1].items())
    return best, kinds


def _gathered_bytes(parts: list[Transformer], batch: MicroBatch, replicas: DataParallel) -> int:
    """Bytes that FSDP2 holds throughout a step, for stages that several pipelines share.

    Parameters are gathered once. Gradients are added up, then reduced block by block.
    """
    if not replicas.sharded:
        return 0
    value = torch.bfloat16.itemsize if batch.precision.activation < 4 else batch.precision.weight
    wide = batch.precision.coefficient
    every = sum(values_on_device(part, replicas.experts) for part in parts)
    blocks = (values_on_device(b, replicas.experts) for part in parts for b in part.blocks)
    buffers = max(exchange_buffers(part, batch, replicas.experts) for part in parts)
    return every * (value + wide) + max(blocks) * wide + buffers
