"""The settings of a run that decide what it needs, and its memory."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn

from mhc_lightning.modules import Transformer
from mhc_lightning.planning.activations import MicroBatch
from mhc_lightning.planning.data_parallel import DataParallel, RowTraining
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.memory import DeviceMemory, device_memory
from mhc_lightning.planning.pipeline import Pipeline, PipelineForecast, forecast
from mhc_lightning.planning.pipeline_memory import pipeline_memory
from mhc_lightning.planning.precision import Precision
from mhc_lightning.planning.row_memory import row_memory


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
        rows: How the tables of a memory are held and trained; the tokens of a step and of the run
            are filled in.
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
    rows: RowTraining = field(default_factory=RowTraining)

    @property
    def sharing(self) -> DataParallel:
        """`replicas`, with what becomes of a memory's tables."""
        tokens = self.batch_size * self.sequence_length
        rows = replace(
            self.rows,
            step_tokens=tokens // self.replicas.devices,
            run_tokens=tokens * self.max_steps,
        )
        return replace(self.replicas, rows=rows)

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


def run_fits(model: Transformer, run: PlannedRun, machine: Machine) -> bool:
    """True if devices and hosts have the memory; the arguments are those of `make_plan`."""
    host = row_memory(model, run.micro_batch(machine), run.sharing).host
    return machine.holds(run_memory(model, run, machine).total, host)


def run_memory(model: Transformer, run: PlannedRun, machine: Machine) -> DeviceMemory:
    """Bytes of a run's fullest device; the arguments are those of `make_plan`."""
    batch = run.micro_batch(machine)
    if run.pipeline is None:
        return device_memory(model, batch, run.sharing, run.state_per_value)
    plan, parts = run.pipeline.plan, run.pipeline.micro_batches
    devices = pipeline_memory(model, plan, parts, batch, run.sharing, run.state_per_value)
    return max((device.memory for device in devices), key=lambda memory: memory.total)


def run_forecast(model: Transformer, run: PlannedRun, machine: Machine) -> PipelineForecast:
    """The prediction of a pipelined run; the arguments are those of `make_plan`."""
    assert run.pipeline is not None
    rest = run.micro_batch(machine), run.sharing, run.state_per_value, machine, run.micro_batches
    return forecast(model, run.pipeline, *rest)
