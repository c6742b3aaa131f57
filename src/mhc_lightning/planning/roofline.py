"""The time of a training step: a roofline, not a simulation.

Matrix products run at a share of the peak. Operations that only move data run after them, at a
share of the memory's bandwidth. Collectives run beside both. Launches, waiting and imbalance cost
nothing here, so real steps take longer.
"""

from dataclasses import dataclass

from mhc_lightning.modules import Transformer
from mhc_lightning.planning.activations import MicroBatch, saved_for_backward
from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.expert_parallel import (
    added_flops,
    exchange,
    on_the_busiest,
    routed_values,
    values_on_device,
)
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.memory import DeviceMemory, copies_weights
from mhc_lightning.planning.recompute import replayed_bytes
from mhc_lightning.planning.row_memory import RowMemory, row_memory
from mhc_lightning.planning.row_traffic import row_traffic
from mhc_lightning.planning.tables import dense_values
from mhc_lightning.planning.traffic import stream_traffic


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        compute: Matrix products and attention.
        traffic: Weights, activations, streams and optimizer state, through device memory.
        communication: Collectives.
        waiting: Waiting of a pipeline's devices for each other.
        rows: Rows of a memory's tables, between devices or between a device and its host.
        rows_hidden: Whether these move while the device computes.
        exchange: All-to-alls of experts, which nothing hides.
    """

    compute: float
    traffic: float
    communication: float
    waiting: float = 0.0
    rows: float = 0.0
    rows_hidden: bool = False
    exchange: float = 0.0

    @property
    def total(self) -> float:
        """The whole step; collectives overlap with the rest."""
        beside = self.communication, self.rows if self.rows_hidden else 0.0
        behind = self.waiting + self.exchange + (0.0 if self.rows_hidden else self.rows)
        return max(self.compute + self.traffic, *beside) + behind


def step_time(
    model: Transformer,
    batch: MicroBatch,
    replicas: DataParallel,
    memory: DeviceMemory,
    machine: Machine,
    micro_batches: int,
) -> StepTime:
    """Predict one optimizer step.

    Args:
        model: The model; it may be on the meta device.
        batch: The micro-batch of one device.
        replicas: The devices, and the state that each holds.
        memory: The prediction of `device_memory` for the devices.
        machine: The kind of the devices.
        micro_batches: Micro-batches of each device per step.
    """
    kind, precision = machine.kind, batch.precision
    peak = kind.low_flops if precision.activation < 4 else kind.full_flops
    per_token = model.flops_per_token(batch.length) + added_flops(model, replicas.experts)
    flops = per_token * batch.tokens * micro_batches

    saved = saved_for_backward(model, batch, copies_weights(batch, replicas))
    saved = on_the_busiest(saved, model, replicas.experts)
    # Written once and read once; the connections' part is in the stream operations already.
    activations = 2 * (sum(saved.values()) - saved["connections"] - saved["weight_copies"])
    streams = stream_traffic(model, precision).training_fused * batch.tokens
    streams += replayed_bytes(model, batch)
    parameters = values_on_device(model, replicas.experts)
    # Forward, gradient of the input, gradient of the weight.
    weights = 3 * parameters * precision.activation
    held = row_memory(model, batch, replicas)
    moving = row_traffic(model, precision, replicas, machine)
    rows = moving.device * batch.tokens
    moved = micro_batches * (activations + streams + weights + rows) + update_bytes(memory, held)

    return StepTime(
        compute=flops / (peak * kind.flops_share),
        traffic=moved / (kind.bandwidth * kind.bandwidth_share),
        communication=_collective_seconds(model, batch, replicas, machine, micro_batches),
        rows=moving.seconds(batch.tokens * micro_batches, ring_link(machine, replicas), machine),
        rows_hidden=replicas.placement == "host",
        exchange=2 * micro_batches * exchange(model, batch, replicas, machine).seconds,
    )


def update_bytes(memory: DeviceMemory, rows: RowMemory) -> int:
    """Bytes that an optimizer step moves for all parameters but tables.

    Args:
        memory: The bytes of a device.
        rows: The tables' part in them.
    """
    # Read weights, gradients and state; write weights and state.
    state = 2 * (memory.weights - rows.weights) + 2 * (memory.optimizer - rows.optimizer)
    return state + memory.gradients - rows.gradients


def _collective_seconds(
    model: Transformer,
    batch: MicroBatch,
    replicas: DataParallel,
    machine: Machine,
    micro_batches: int,
) -> float:
    """Seconds per step in ring collectives."""
    precision, parameters = batch.precision, dense_values(model)
    if not replicas.sharded:
        size = 2 * parameters * precision.weight
        return ring_seconds(size, replicas.devices, _in_node(replicas, machine), machine)
    # Gathered for forward and for backward, and reduced, for each micro-batch.
    moved = micro_batches * (2 * precision.activation + precision.coefficient)
    return sharing_seconds(parameters, routed_values(model), moved, replicas, machine)


def sharing_seconds(
    parameters: float, routed: float, moved: float, replicas: DataParallel, machine: Machine
) -> float:
    """Seconds in which devices gather and reduce what they share.

    Args:
        parameters: Number of parameters, those of experts included.
        routed: Number of parameters of routed experts; only the devices that hold the same ones
            share them.
        moved: Bytes gathered and reduced for each parameter.
        replicas: The devices.
        machine: Devices and their links.
    """
    spread, devices, inside = replicas.experts.size, replicas.devices, _in_node(replicas, machine)
    if spread == 1:
        return ring_seconds(parameters * moved, devices, inside, machine)
    others = ring_seconds((parameters - routed) * moved, devices, inside, machine)
    alike = max(1, inside // spread)  # of the devices that hold the same experts
    own = ring_seconds(routed / spread * moved, devices // spread, alike, machine)
    return others + own


def ring_seconds(size: float, devices: int, inside: int, machine: Machine) -> float:
    """Seconds of a ring collective: each device sends all but its share of `size` bytes.

    Args:
        size: Bytes gathered or reduced.
        devices: Devices of the ring.
        inside: Devices of the ring in one node; the node's other devices have rings of their own.
        machine: Devices and their links.
    """
    link = _ring_link(machine, devices, inside) * machine.kind.link_share
    return (devices - 1) / devices * size / link


def ring_link(machine: Machine, replicas: DataParallel) -> float:
    """Bytes per second of a device in a ring; the devices of a node use all its adapters."""
    return _ring_link(machine, replicas.devices, _in_node(replicas, machine))


def _in_node(replicas: DataParallel, machine: Machine) -> int:
    return replicas.in_node(machine.kind.per_node)


def _ring_link(machine: Machine, devices: int, inside: int) -> float:
    kind = machine.kind
    return kind.link if devices <= inside else min(kind.link, kind.network * inside)
