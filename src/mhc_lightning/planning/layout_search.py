"""The best layouts of a run on a machine, found without simulating all of them.

Layouts are taken in the order of a bound, the time that they need at least. As soon as it exceeds
the time of the last of the best ones found, no other can be among them.
"""

from dataclasses import dataclass
from typing import Any

from mhc_lightning.errors import UserError
from mhc_lightning.formatting import format_bytes, format_seconds
from mhc_lightning.modules import Transformer
from mhc_lightning.planning.activations import MicroBatch
from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.layouts import Candidate, Layout, candidates, fastest, of_forecast
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.planned_run import PlannedRun, run_fits, run_forecast, run_memory
from mhc_lightning.planning.roofline import StepTime, step_time
from mhc_lightning.planning.saved_tensors import likeness
from mhc_lightning.planning.simulation import StageTimes
from mhc_lightning.planning.stage_part import part_of
from mhc_lightning.planning.stage_times import times_of_part


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        layouts: The best layouts, the fastest first.
        tried: Layouts that the machine and the batch allow.
        simulated: Layouts among them whose prediction had to be made.
    """

    layouts: list[Layout]
    tried: int
    simulated: int

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "layouts": [layout.record() for layout in self.layouts],
            "why": why_first(self.layouts),
            "tried": self.tried,
            "simulated": self.simulated,
        }


def search_layouts(
    model: Transformer,
    run: PlannedRun,
    machine: Machine,
    *,
    best: int = 10,
    split_backward: bool = True,
    few: bool = False,
) -> Found:
    """The fastest layouts that fit into memory.

    Args:
        model: The model; it may be on the meta device.
        run: The run; its layout is replaced.
        machine: The machine.
        best: How many are wanted.
        split_backward: Whether schedules may split the backward pass.
        few: Whether to look at few layouts, for a first impression: see `candidates`.

    Raises:
        UserError: No layout shares out the batch, or none fits; says what would do.
    """
    times = _Times(model, machine)
    possible = [
        (times.fastest(each), number, each)
        for number, each in enumerate(
            candidates(model, run, machine, split_backward=split_backward, few=few)
        )
    ]
    if not possible:
        raise UserError(
            f"data.batch_size={run.batch_size} sequences cannot be shared out among"
            f" {machine.name} in any layout; use a multiple of {machine.devices}, or fewer devices"
        )
    possible.sort(key=lambda each: each[:2])
    found: list[Layout] = []
    simulated = 0
    for bound, _, candidate in possible:
        if len(found) >= best and bound >= found[-1].seconds:
            break
        layout = times.predict(candidate)
        simulated += 1
        if layout is not None:
            found = sorted([*found, layout], key=lambda each: each.seconds)[:best]
    if not found:
        least = min(run_memory(model, each.run, machine).total for _, _, each in possible)
        raise UserError(
            f"no layout fits into {format_bytes(machine.kind.memory)} ({machine.name}); the least"
            f" that one needs is {format_bytes(least)}: use more devices, or a shorter"
            " data.sequence_length"
        )
    return Found(found, len(possible), simulated)


def why_first(layouts: list[Layout]) -> str:
    """One sentence: why the first layout is faster than the best of another kind."""
    first = layouts[0]

    def kind(layout: Layout) -> tuple[Any, ...]:
        return layout.name, layout.pipeline_size, layout.run.replicas.experts.size

    others = [layout for layout in layouts[1:] if kind(layout) != kind(first)] or layouts[1:]
    if not others:
        return "It is the only layout that fits."
    other = others[0]
    gains = {
        "computes": other.computing - first.computing,
        "waits for other stages": other.waiting - first.waiting,
        "waits for communication": other.exposed - first.exposed,
    }
    gain, seconds = max(gains.items(), key=lambda item: item[1])
    loss, cost = min(gains.items(), key=lambda item: item[1])
    faster = other.seconds / first.seconds - 1
    sentence = (
        f"The first is {faster:.1%} faster than {describe(other)}: a device {gain}"
        f" {format_seconds(seconds)} less per step"
    )
    if cost < -0.1 * seconds:
        sentence += f", though it {loss} {format_seconds(-cost)} more"
    return sentence + "."


def describe(layout: Layout) -> str:
    """A layout in a few words."""
    experts = layout.run.replicas.experts.size
    text = layout.name
    if layout.pipeline_size > 1:
        text += f" over {layout.pipeline_size} devices"
    if experts > 1:
        text += f" with experts over {experts}"
    return text


class _Times:
    """Times of layouts; those of stages are kept, since many layouts have the same."""

    def __init__(self, model: Transformer, machine: Machine) -> None:
        self._model = model
        self._machine = machine
        self._stages: dict[tuple[Any, ...], StageTimes] = {}
        alike: dict[tuple[Any, ...], int] = {}
        self._kinds = [alike.setdefault(likeness(block), len(alike)) for block in model.blocks]

    def fastest(self, candidate: Candidate) -> float:
        """Seconds that a step takes at least."""
        run = candidate.run
        if run.pipeline is None:
            return self._step(run).total
        plan, batch = run.pipeline.plan, run.micro_batch(self._machine)
        times = [
            self._stage(blocks, batch, run.sharing, splits=plan.kind.splits_backward)
            for blocks in plan.blocks
        ]
        return run.micro_batches * fastest(plan, run.pipeline.micro_batches, times)

    def predict(self, candidate: Candidate) -> Layout | None:
        """The whole prediction; None if the layout does not fit."""
        run = candidate.run
        if not run_fits(self._model, run, self._machine):
            return None
        if run.pipeline is not None:
            return of_forecast(candidate, run_forecast(self._model, run, self._machine))
        step = self._step(run)
        computing = step.compute + step.traffic
        return Layout(
            run,
            candidate.recompute,
            memory=run_memory(self._model, run, self._machine).total,
            seconds=step.total,
            bubble=0.0,
            computing=computing,
            sent=step.communication + step.exchange,
            exposed=step.total - computing,
        )

    def _stage(
        self, blocks: range, batch: MicroBatch, replicas: DataParallel, *, splits: bool
    ) -> StageTimes:
        ends = blocks.start == 0, blocks.stop == len(self._kinds)
        key = *(self._kinds[k] for k in blocks), ends, batch, replicas, splits
        if key not in self._stages:
            part, where = part_of(self._model, blocks), (replicas, self._machine)
            self._stages[key] = times_of_part(part, batch, *where, splits=splits)
        return self._stages[key]

    def _step(self, run: PlannedRun) -> StepTime:
        memory = run_memory(self._model, run, self._machine)
        batch, passes = run.micro_batch(self._machine), run.micro_batches
        return step_time(self._model, batch, run.sharing, memory, self._machine, passes)
