"""Predicted memory and time of a pipeline."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from mhc_lightning.modules import Transformer
from mhc_lightning.planning.activations import MicroBatch
from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.expert_parallel import added_flops, routed_values
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.measured_times import MeasuredTimes
from mhc_lightning.planning.pipeline_memory import (
    PipelineDevice,
    boundary_bytes,
    pipeline_memory,
)
from mhc_lightning.planning.roofline import StepTime, sharing_seconds, update_bytes
from mhc_lightning.planning.schedule_order import schedule_order
from mhc_lightning.planning.simulation import simulate
from mhc_lightning.planning.stage_part import part_of
from mhc_lightning.planning.stage_times import row_times, stage_times, transfer_times
from mhc_lightning.planning.stages import StagePlan, cut_network
from mhc_lightning.planning.timeline import Timeline


@dataclass(frozen=True)
class Pipeline:
    """The layout of a pipeline: stages, micro-batches, recompute.

    Attributes:
        plan: The stages, and the device of each.
        micro_batches: Parts that the sequences of one pass are cut into.
        recompute: The setting `recompute=`; the block size that it gives depends on the stages.
        measured: Measured times, used in place of the roofline.
    """

    plan: StagePlan
    micro_batches: int
    recompute: str | int | None = None
    measured: MeasuredTimes | None = None

    def recompute_block(self, model: Transformer) -> int:
        """Sub-layers per recompute block; 0 if nothing is recomputed."""
        return model.set_recompute(self.recompute, [len(blocks) for blocks in self.plan.blocks])

    def under(self, schedule: str, model: Transformer, batch: int) -> "Pipeline":
        """The layout of the same devices under another schedule.

        Args:
            schedule: A key of `SCHEDULES`.
            model: The model that is cut into stages; with equally many stages, the cut stays.
            batch: Sequences of one pass.

        Raises:
            UserError: The layout does not fit the schedule, or no times were measured for it.
        """
        plan = cut_network(model, schedule=schedule, devices=self.plan.devices)
        if len(plan.blocks) == len(self.plan.blocks):
            plan = replace(plan, blocks=self.plan.blocks)
        plan.check_micro_batches(self.micro_batches, batch)
        if self.measured is not None:
            self.measured.check(len(plan.blocks))
        return replace(self, plan=plan)


@dataclass(frozen=True)
class PipelineForecast:
    """The prediction of a pipelined run.

    Attributes:
        pipeline: Its layout.
        devices: The memory of each device of a pipeline.
        sequential: One pass with transfers and rebuilding on the critical path.
        overlapped: One pass with transfers and rebuilding overlapped as far as possible.
        passes: Passes per optimizer step.
        update: Seconds in which the optimizer changes the weights.
        collectives: Seconds of a pass in which pipelines gather and reduce their shared state.
        rows: Seconds of a pass in which rows of a memory's tables move to the device and back.
        rows_hidden: Whether they move while the device computes.
        arithmetic: Seconds of matrix products in a pass, mean over devices.
        boundary_bytes: Bytes of a micro-batch across a boundary.
    """

    pipeline: Pipeline
    devices: list[PipelineDevice]
    sequential: Timeline
    overlapped: Timeline
    passes: int
    update: float
    collectives: float
    rows: float
    rows_hidden: bool
    arithmetic: float
    boundary_bytes: int

    @cached_property
    def fullest(self) -> PipelineDevice:
        """The device that needs the most memory."""
        return max(self.devices, key=lambda device: device.memory.total)

    def seconds(self, *, overlapped: bool) -> float:
        """Seconds of one optimizer step."""
        hidden, waited = (self.rows, 0.0) if self.rows_hidden else (0.0, self.rows)
        if overlapped:
            a_pass = max(self.overlapped.seconds, self.collectives, hidden)
        else:
            a_pass = max(self.sequential.seconds + self.collectives, hidden)
        return self.passes * (a_pass + waited) + self.update

    @property
    def step_seconds(self) -> StepTime:
        """An optimizer step with nothing overlapped, as a mean over devices.

        Measured times do not separate arithmetic from traffic: then `compute` is their sum, and
        `traffic` is the optimizer's.
        """
        line = self.sequential
        busy = self.passes * sum(map(line.busy, range(line.devices))) / line.devices
        measured = self.pipeline.measured is not None
        compute = busy if measured else min(busy, self.passes * self.arithmetic)
        spent = StepTime(
            compute,
            busy - compute + self.update,
            self.passes * self.collectives,
            rows=self.passes * self.rows,
            rows_hidden=self.rows_hidden,
            exchange=self.passes * sum(line.exposed) / line.devices,
        )
        return replace(spent, waiting=self.seconds(overlapped=False) - spent.total)

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plan = self.pipeline.plan
        return {
            "schedule": plan.schedule,
            "pipeline_size": plan.devices,
            "micro_batches": self.pipeline.micro_batches,
            "passes_per_step": self.passes,
            "blocks_per_stage": [len(blocks) for blocks in plan.blocks],
            "boundary_bytes": self.boundary_bytes,
            "fullest_device": self.fullest.device,
            "devices": [
                {
                    "stages": list(device.stages),
                    "blocks": device.blocks,
                    "in_flight": device.in_flight,
                    "memory_bytes": {**asdict(device.memory), "total": device.memory.total},
                }
                for device in self.devices
            ],
            **self.summary(),
        }

    def summary(self) -> dict[str, Any]:
        """Plain values by which schedules are compared."""
        return {
            "fullest_bytes": self.fullest.memory.total,
            "sequential": {
                "step_seconds": self.seconds(overlapped=False),
                "bubble": self.sequential.bubble,
                "exchange_seconds": self.passes * max(self.sequential.exposed),
            },
            "overlapped": {
                "step_seconds": self.seconds(overlapped=True),
                "bubble": self.overlapped.bubble,
                "exchange_seconds": self.passes * max(self.overlapped.exposed),
            },
        }


def forecast(
    model: Transformer,
    pipeline: Pipeline,
    batch: MicroBatch,
    replicas: DataParallel,
    state_per_value: Callable[[nn.Module, nn.Parameter], int],
    machine: Machine,
    passes: int,
) -> PipelineForecast:
    """Predict a pipelined run.

    Args:
        model: The whole model; it may be on the meta device.
        pipeline: The layout of one pipeline.
        batch: A micro-batch; its recompute block is replaced by the pipeline's.
        replicas: The pipelines that share each stage's state.
        state_per_value: Numbers that the optimizer keeps for each value of a parameter of a model.
        machine: The devices.
        passes: Passes through the pipeline per optimizer step.
    """
    plan, parts, kind = pipeline.plan, pipeline.micro_batches, machine.kind
    batch = replace(batch, recompute_block=pipeline.recompute_block(model))
    devices = pipeline_memory(model, plan, parts, batch, replicas, state_per_value)
    bandwidth = kind.bandwidth * kind.bandwidth_share
    update = max(update_bytes(d.memory, d.rows) / bandwidth for d in devices)
    peak = kind.low_flops if batch.precision.activation < 4 else kind.full_flops
    per_token = model.flops_per_token(batch.length) + added_flops(model, replicas.experts)
    flops = per_token * batch.tokens * parts
    arithmetic = flops / plan.devices / (peak * kind.flops_share)
    measured = pipeline.measured
    if measured is None:
        times = stage_times(model, plan, batch, replicas, machine)
        transfers = transfer_times(model, plan, batch, replicas, machine)
        rows = parts * max(row_times(model, plan, batch, replicas, machine))
    else:
        times, transfers, rows = list(measured.stages), list(measured.transfers), 0.0
        update = update if measured.update is None else measured.update
    order = schedule_order(plan, parts)
    stages = [part_of(model, blocks) for blocks in plan.blocks]
    return PipelineForecast(
        pipeline=pipeline,
        devices=devices,
        sequential=simulate(plan, order, times, transfers, overlapped=False),
        overlapped=simulate(plan, order, times, transfers, overlapped=True),
        passes=passes,
        update=update,
        collectives=max(_collective_seconds(d, stages, batch, replicas, machine) for d in devices),
        rows=rows,
        rows_hidden=replicas.placement == "host",
        arithmetic=arithmetic,
        boundary_bytes=boundary_bytes(model, batch),
    )


def _collective_seconds(
    device: PipelineDevice, parts: list[Transformer], batch: MicroBatch, *where: Any
) -> float:
    """Seconds of a pass in which a device's stages are gathered once and reduced once."""
    replicas, machine = where
    if not replicas.sharded:
        return 0.0
    precision = batch.precision
    dense = device.memory.gradients - device.rows.gradients
    parameters = dense * replicas.devices / precision.weight
    routed = sum(routed_values(parts[stage]) for stage in device.stages)
    moved = precision.activation + precision.coefficient
    return sharing_seconds(parameters, routed, moved, replicas, machine)
