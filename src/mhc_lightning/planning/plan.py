"""The plan of a run: its parameters, memory, traffic and time, predicted before it starts."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mhc_lightning.modules import Transformer
from mhc_lightning.planning.activations import MicroBatch, saved_for_backward
from mhc_lightning.planning.expert_parallel import on_the_busiest
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.memory import DeviceMemory, copies_weights, device_memory
from mhc_lightning.planning.parameters import ParameterCounts, count_parameters
from mhc_lightning.planning.pipeline import PipelineForecast
from mhc_lightning.planning.placements import PlacedRows, placements_of
from mhc_lightning.planning.planned_run import PlannedRun, run_forecast, run_memory
from mhc_lightning.planning.recompute import best_block, rebuilt_bytes
from mhc_lightning.planning.roofline import StepTime, step_time
from mhc_lightning.planning.schedule_comparison import Comparison, compare_schedules
from mhc_lightning.planning.tables import ngram_tables
from mhc_lightning.planning.traffic import StreamTraffic, stream_traffic


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
        placements: The run with a memory's tables in each of `PLACEMENTS`; empty without tables.
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
    placements: dict[str, PlacedRows] = field(default_factory=dict)
    pipeline: PipelineForecast | None = None
    schedules: dict[str, Comparison] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """True if the memory of a device suffices, and that of its host."""
        return self.machine.holds(self.memory.total, self.host_memory)

    @property
    def host_memory(self) -> int:
        """Bytes of a memory's tables in the memory of a node's host."""
        placed = self.placements.get(self.run.sharing.placement)
        return 0 if placed is None else placed.rows.host

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
        if self.placements:
            placements = {name: each.record() for name, each in self.placements.items()}
            record["memory_rows"] = {
                "placement": self.run.sharing.placement,
                "placements": placements,
            }
            record["host_memory_bytes_available_per_machine"] = kind.host_memory
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
    if ngram_tables(model):
        plan = replace(plan, placements=placements_of(model, run, machine))
    if run.pipeline is None:
        return plan
    found = run_forecast(model, run, machine)
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


def with_schedules(plan: Plan, model: Transformer, baseline: Transformer | None) -> Plan:
    """Add the prediction under every schedule to a pipeline's plan.

    Args:
        plan: The result of `make_plan` for `model`.
        model: The model.
        baseline: The model with the ordinary residual connection; None for no comparison.
    """
    run = plan.run
    assert run.pipeline is not None
    rest = run.sharing, run.state_per_value, plan.machine, run.micro_batches
    batch = run.micro_batch(plan.machine)
    return replace(plan, schedules=compare_schedules(model, baseline, run.pipeline, batch, *rest))


def _plan(model: Transformer, run: PlannedRun, machine: Machine) -> Plan:
    batch = run.micro_batch(machine)
    copies = copies_weights(batch, run.sharing)
    memory = device_memory(model, batch, run.sharing, run.state_per_value)
    block = run.recompute_block or best_block(model)
    without, within = replace(batch, recompute_block=0), replace(batch, recompute_block=block)

    def saved(batch: MicroBatch) -> dict[str, int]:
        kept = saved_for_backward(model, batch, copies)
        return on_the_busiest(kept, model, run.sharing.experts)

    kept = saved(within)
    return Plan(
        machine=machine,
        run=run,
        parameters=count_parameters(model),
        memory=memory,
        activations=saved(batch),
        activations_without_recompute=sum(saved(without).values()),
        activations_with_recompute=sum(kept.values()) + rebuilt_bytes(model, within),
        recompute_block=block,
        flops_per_token=model.flops_per_token(run.sequence_length),
        stream_bytes_per_token=stream_traffic(model, run.precision),
        step_seconds=step_time(model, batch, run.sharing, memory, machine, run.micro_batches),
    )
