"""The layouts that a run can have on a machine, and what each is predicted to need."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Transformer
from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.expert_parallel import experts_of
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.pipeline import Pipeline, PipelineForecast
from mhc_lightning.planning.planned_run import PlannedRun
from mhc_lightning.planning.simulation import StageTimes
from mhc_lightning.planning.stages import SCHEDULES, StagePlan, cut_network
from mhc_lightning.planning.timeline import Activity

MICRO_BATCHES = (1, 2, 4, 8)
_PARTS = (4, 8, 16)  # micro-batches of a pass, for each device of a pipeline
_MOST_PARTS = 128


@dataclass(frozen=True)
class Layout:
    """A layout and its prediction, with communication overlapped where the schedule allows it.

    Attributes:
        run: The run with this layout.
        recompute: The setting `recompute=`.
        memory: Bytes of the fullest device.
        seconds: Seconds of an optimizer step.
        bubble: Share of the devices' time in which they wait for each other.
        computing: Seconds of a step in which the mean device computes.
        sent: Seconds of a step in which a device's collectives, all-to-alls and transfers travel.
        exposed: The part of `sent` that nothing hides.
    """

    run: PlannedRun
    recompute: str
    memory: int
    seconds: float
    bubble: float
    computing: float
    sent: float
    exposed: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, over all devices."""
        return self.run.batch_size * self.run.sequence_length / self.seconds

    @property
    def pipeline_size(self) -> int:
        """Devices of a pipeline; 1 without pipelines."""
        return 1 if self.run.pipeline is None else self.run.pipeline.plan.devices

    @property
    def name(self) -> str:
        """The schedule of a pipeline; else how the devices share the model."""
        if self.run.pipeline is not None:
            return self.run.pipeline.plan.schedule
        return "fsdp" if self.run.replicas.sharded else "ddp"

    @property
    def micro_batch(self) -> int:
        """Sequences of a forward pass."""
        parts = 1 if self.run.pipeline is None else self.run.pipeline.micro_batches
        return self.run.micro_batch_size // parts

    @property
    def waiting(self) -> float:
        """Seconds of a step in which the mean device waits for other stages."""
        return max(0.0, self.seconds - self.computing - self.exposed)

    @property
    def settings(self) -> str:
        """The layout as overrides of a command."""
        run = self.run
        words = [f"strategy={self.name if run.pipeline is None else 'pipeline'}"]
        if run.pipeline is not None:
            words += [
                f"strategy.schedule={self.name}",
                f"strategy.pipeline_size={self.pipeline_size}",
                f"strategy.microbatches={run.pipeline.micro_batches}",
            ]
            words += ["strategy.overlap=true"] * (self.name == "dualpipev")
        if run.replicas.experts.size > 1:
            words.append(f"strategy.expert_parallel_size={run.replicas.experts.size}")
        words += [f"data.micro_batch_size={run.micro_batch_size}", f"recompute={self.recompute}"]
        return " ".join(words)

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "pipeline_size": self.pipeline_size,
            "expert_parallel_size": self.run.replicas.experts.size,
            "data_parallel_size": self.run.replicas.devices,
            "schedule": self.name,
            "micro_batch": self.micro_batch,
            "micro_batches_per_pass": self.run.micro_batch_size // self.micro_batch,
            "recompute": self.recompute,
            "memory_bytes": self.memory,
            "bubble": self.bubble,
            "computing_seconds": self.computing,
            "communication_seconds": self.sent,
            "exposed_communication_seconds": self.exposed,
            "step_seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "settings": self.settings,
        }


@dataclass(frozen=True)
class Candidate:
    """A layout whose prediction is not made yet.

    Attributes:
        run: The run with this layout.
        recompute: The setting `recompute=`.
    """

    run: PlannedRun
    recompute: str


def candidates(
    model: Transformer,
    run: PlannedRun,
    machine: Machine,
    *,
    split_backward: bool,
    few: bool = False,
) -> Iterator[Candidate]:
    """Every layout of a run on a machine, whether it fits into memory or not.

    Args:
        model: The model; it may be on the meta device.
        run: The run; its layout is replaced.
        machine: The machine.
        split_backward: Whether schedules may split the backward pass.
        few: Whether to leave out all but `1f1b` and `dualpipev`, one sequence at a time, long
            passes, and recompute.
    """
    devices = machine.devices
    settings = ["off", "auto"]
    if replace(Pipeline(_whole(model), 1), recompute="auto").recompute_block(model) == 0:
        settings = ["off"]
    settings = settings[-1:] if few else settings
    experts = [layer.num_experts for layer in experts_of(model)]
    for size in divisors(devices):
        count = devices // size
        spreads = [n for n in divisors(count) if all(each % n == 0 for each in experts)]
        spreads = spreads if experts else [1]
        kinds = _replicas(run, count, spreads, size)
        plans: list[StagePlan | None] = [None]
        if size > 1:
            plans = [*_plans(model, size, split_backward)]
        if few:
            plans = [p for p in plans if p is None or p.schedule in ("1f1b", "dualpipev")]
        for micro_batch in MICRO_BATCHES[:1] if few else MICRO_BATCHES:
            whole, rest = divmod(run.batch_size, count * micro_batch)
            if rest or not whole:
                continue
            for replicas in kinds:
                for plan in plans:
                    for setting in settings:
                        lengths = _parts(plan, whole)
                        for parts in lengths[-1:] if few else lengths:
                            changed = replace(
                                run,
                                micro_batch_size=micro_batch * parts,
                                replicas=replicas,
                                pipeline=None if plan is None else Pipeline(plan, parts, setting),
                            )
                            block = _recompute_block(model, changed, setting)
                            yield Candidate(replace(changed, recompute_block=block), setting)


def divisors(number: int) -> list[int]:
    """The divisors of a number, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def fastest(plan: StagePlan, parts: int, times: Sequence[StageTimes]) -> float:
    """Seconds that one pass takes at least, whatever its order, with everything overlapped.

    The busiest device computes without a break once the first micro-batch has come to it.

    Args:
        plan: The stages and their schedule.
        parts: Micro-batches of the pass.
        times: Times of each stage.
    """
    bound = 0.0
    for device in range(plan.devices):
        held = plan.stages_of(device)
        own = [times[stage] for stage in held]
        busy = sum(each.forward + each.backward for each in own)
        sent = sum(2 * (each.dispatch + each.combine) for each in own)
        merges = sum(each.merge_forward + each.merge_backward for each in own)
        work = max(busy - merges, sent) if plan.kind.pairs_stages else busy + sent
        before = times[: held[0]]
        start = sum(each.forward + each.dispatch + each.combine for each in before)
        if plan.kind.stages_per_device == 1:
            start += sum(each.backward + each.dispatch + each.combine for each in before)
        bound = max(bound, start + parts * work)
    return bound


def of_forecast(candidate: Candidate, forecast: PipelineForecast) -> Layout:
    """The prediction of a pipelined layout."""
    line, passes = forecast.overlapped, forecast.passes
    travelling = [
        sum(
            span.end - span.start
            for span in line.spans
            if span.device == device and span.work in (Activity.SEND, Activity.EXCHANGE)
        )
        for device in range(line.devices)
    ]
    seconds = forecast.seconds(overlapped=True)
    computing = passes * sum(map(line.busy, range(line.devices))) / line.devices
    behind = max(0.0, forecast.collectives - line.seconds)
    return Layout(
        candidate.run,
        candidate.recompute,
        memory=forecast.fullest.memory.total,
        seconds=seconds,
        bubble=line.bubble,
        computing=computing + forecast.update,
        sent=passes * (max(travelling) + forecast.collectives),
        exposed=passes * (sum(line.exposed) / line.devices + behind),
    )


def _whole(model: Transformer) -> StagePlan:
    return StagePlan("gpipe", 1, (range(len(model.blocks)),))


def _recompute_block(model: Transformer, run: PlannedRun, setting: str) -> int:
    pipeline = run.pipeline or Pipeline(_whole(model), 1)
    return replace(pipeline, recompute=setting).recompute_block(model)


def _replicas(run: PlannedRun, count: int, spreads: Sequence[int], size: int) -> list[DataParallel]:
    """The ways in which `count` pipelines of `size` devices share a model."""
    found = [
        replace(
            run.replicas,
            devices=count,
            sharded=count > 1,
            copies_gradients=False,
            pipeline_size=size,
            experts=replace(run.replicas.experts, size=spread),
        )
        for spread in spreads
    ]
    if count > 1 and size == 1:
        found.append(replace(found[0], sharded=False))
    return found


def _plans(model: Transformer, size: int, split_backward: bool) -> Iterator[StagePlan]:
    for schedule, kind in SCHEDULES.items():
        if kind.splits_backward and not split_backward:
            continue
        try:
            yield cut_network(model, schedule=schedule, devices=size)
        except UserError:  # more stages than blocks
            continue


def _parts(plan: StagePlan | None, whole: int) -> list[int]:
    """The numbers of micro-batches per pass that are tried."""
    if plan is None:
        return [1]
    found = []
    for each in _PARTS:
        most = min(max(each * plan.devices, len(plan.blocks)), _MOST_PARTS)
        for parts in range(min(most, whole), 0, -1):
            if whole % parts == 0:
                try:
                    plan.check_micro_batches(parts, parts)
                except UserError:
                    continue
                found.append(parts)
                break
    return sorted(set(found))
