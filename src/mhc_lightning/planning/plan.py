"""The plan of a run: its parameters, memory, traffic and time, predicted before it starts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from mhc_lightning.modules import Transformer
from mhc_lightning.planning.activations import MicroBatch, saved_for_backward
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.memory import DataParallel, DeviceMemory, copies_weights, device_memory
from mhc_lightning.planning.parameters import ParameterCounts, count_parameters
from mhc_lightning.planning.pipeline import (
    Comparison,
    Pipeline,
    PipelineForecast,
    compare_schedules,
    forecast,
)
from mhc_lightning.planning.pipeline_memory import pipeline_memory
from mhc_lightning.planning.precision import Precision
from mhc_lightning.planning.recompute import best_block, rebuilt_bytes
from mhc_lightning.planning.roofline import StepTime, step_time
from mhc_lightning.planning.traffic import StreamTraffic, stream_traffic


@dataclass(frozen=True)
class PlannedRun:
    """The settings of a run that decide its memory and time.

    Attributes:
        batch_size: Sequences per optimizer step, over all devices.
        micro_batch_size: Sequences that a device, or a pipeline, takes at a time.
        sequence_length: Tokens of a sequence.
        max_steps: Optimizer steps.
        precision: Sizes of weights and activations.
        replicas: Devices, or pipelines, and the state that each holds.
        state_per_value: Numbers that the optimizer keeps for each value of a parameter of a model.
        recompute_block: Sub-layers per recompute block; 0 if nothing is recomputed.
        pipeline: Layout of each pipeline; None without pipelines.
    """

    batch_size: int
    micro_batch_size: int
    sequence_length: int
    max_steps: int
    precision: Precision
    replicas: DataParallel
    state_per_value: Callable[[nn.Module, nn.Parameter], int]
    recompute_block: int = 0
    pipeline: Pipeline | None = None

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.replicas.devices * (1 if self.pipeline is None else self.pipeline.plan.devices)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per optimizer step and device; of a pipeline, passes through it."""
        return max(1, self.batch_size // (self.micro_batch_size * self.replicas.devices))

    def micro_batch(self, machine: Machine) -> MicroBatch:
        """The micro-batch that one device of `machine` computes at a time."""
        parts = 1 if self.pipeline is None else self.pipeline.micro_batches
        return MicroBatch(
            self.micro_batch_size // parts,
            self.sequence_length,
            self.precision,
            machine.kind.is_gpu,
            self.recompute_block,
        )


@dataclass(frozen=True)
class Plan:
    """The predicted needs and times of a run.

    Attributes:
        machine: The machine.
        run: The settings.
        parameters: Parameter counts.
        memory: Bytes per device.
        activations: Bytes kept for backward per device, by kind.
        activations_without_recompute: Sum of these bytes if nothing is recomputed.
        activations_with_recompute: Sum of these bytes if stream operations are recomputed, with the
            bytes that backward rebuilds at a time.
        recompute_block: Sub-layers per recompute block: the run's, or the best number (eq. 20) if
            it has none; 0 if no connection can be replayed.
        flops_per_token: FLOPs of forward and backward.
        stream_bytes_per_token: Bytes that stream operations move.
        step_seconds: Seconds of one optimizer step.
        pipeline: The prediction of each device of a pipeline; `memory` and `activations` are those
            of the fullest.
        schedules: The run under every schedule of a pipeline.
    """

    machine: Machine
    run: PlannedRun
    parameters: ParameterCounts
    memory: DeviceMemory
    activations: dict[str, int]
    activations_without_recompute: int
    activations_with_recompute: int
    recompute_block: int
    flops_per_token: int
    stream_bytes_per_token: StreamTraffic
    step_seconds: StepTime
    pipeline: PipelineForecast | None = None
    schedules: dict[str, Comparison] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """True if the memory of a device suffices."""
        return self.memory.total <= self.machine.kind.memory

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.run.batch_size * self.run.sequence_length * self.run.max_steps

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, over all devices."""
        return self.run.batch_size * self.run.sequence_length / self.step_seconds.total

    @property
    def days(self) -> float:
        """Days until the last step."""
        return self.run.max_steps * self.step_seconds.total / 86400

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        kind = self.machine.kind
        record: dict[str, Any] = {
            "machine": self.machine.name,
            "devices": self.run.devices,
            "parameters": self.parameters._asdict(),
            "memory_bytes_per_device": {**asdict(self.memory), "total": self.memory.total},
            "memory_bytes_available_per_device": kind.memory,
            "fits": self.fits,
            "activation_bytes_per_device": {
                **self.activations,
                "without_recompute": self.activations_without_recompute,
                "with_recompute": self.activations_with_recompute,
            },
            "recompute_block": self.recompute_block,
            "flops_per_token": self.flops_per_token,
            "stream_bytes_per_token": self.stream_bytes_per_token._asdict(),
            "micro_batches_per_step": self.run.micro_batches,
            "step_seconds": {**asdict(self.step_seconds), "total": self.step_seconds.total},
            "tokens_per_second": self.tokens_per_second,
            "tokens": self.tokens,
            "days": self.days,
        }
        if self.pipeline is not None:
            schedules = {name: each.record() for name, each in self.schedules.items()}
            record["pipeline"] = {**self.pipeline.record(), "schedules": schedules}
        return record


def make_plan(model: Transformer, run: PlannedRun, machine: Machine) -> Plan:
    """Plan a run.

    Args:
        model: The model; on the meta device it costs no memory.
        run: The settings.
        machine: The machine.
    """
    plan = _plan(model, run, machine)
    if run.pipeline is None:
        return plan
    batch = run.micro_batch(machine)
    rest = batch, run.replicas, run.state_per_value, machine, run.micro_batches
    found = forecast(model, run.pipeline, *rest)

    best = replace(run.pipeline, recompute="auto").recompute_block(model)
    without = run_memory(model, replace(run, recompute_block=0), machine)
    within = run_memory(model, replace(run, recompute_block=run.recompute_block or best), machine)
    return replace(
        plan,
        memory=found.fullest.memory,
        activations=found.fullest.activations,
        activations_without_recompute=without.activations,
        activations_with_recompute=within.activations + within.rebuilt,
        recompute_block=run.recompute_block or best,
        step_seconds=found.step_seconds,
        pipeline=found,
    )


def run_memory(model: Transformer, run: PlannedRun, machine: Machine) -> DeviceMemory:
    """Bytes of a run's fullest device; the arguments are those of `make_plan`."""
    batch = run.micro_batch(machine)
    if run.pipeline is None:
        return device_memory(model, batch, run.replicas, run.state_per_value)
    plan, parts = run.pipeline.plan, run.pipeline.micro_batches
    devices = pipeline_memory(model, plan, parts, batch, run.replicas, run.state_per_value)
    return max((device.memory for device in devices), key=lambda memory: memory.total)


def with_schedules(plan: Plan, model: Transformer, baseline: Transformer | None) -> Plan:
    """Add the prediction under every schedule to a pipeline's plan.

    Args:
        plan: The result of `make_plan` for `model`.
        model: The model.
        baseline: The model with the ordinary residual connection; None for no comparison.
    """
    run = plan.run
    assert run.pipeline is not None
    rest = run.replicas, run.state_per_value, plan.machine, run.micro_batches
    batch = run.micro_batch(plan.machine)
    return replace(plan, schedules=compare_schedules(model, baseline, run.pipeline, batch, *rest))


def _plan(model: Transformer, run: PlannedRun, machine: Machine) -> Plan:
    batch = run.micro_batch(machine)
    copies = copies_weights(batch, run.replicas)
    memory = device_memory(model, batch, run.replicas, run.state_per_value)
    block = run.recompute_block or best_block(model)
    without, within = replace(batch, recompute_block=0), replace(batch, recompute_block=block)
    kept = saved_for_backward(model, within, copies)
    return Plan(
        machine=machine,
        run=run,
        parameters=count_parameters(model),
        memory=memory,
        activations=saved_for_backward(model, batch, copies),
        activations_without_recompute=sum(saved_for_backward(model, without, copies).values()),
        activations_with_recompute=sum(kept.values()) + rebuilt_bytes(model, within),
        recompute_block=block,
        flops_per_token=model.flops_per_token(run.sequence_length),
        stream_bytes_per_token=stream_traffic(model, run.precision),
        step_seconds=step_time(model, batch, run.replicas, memory, machine, run.micro_batches),
    )
