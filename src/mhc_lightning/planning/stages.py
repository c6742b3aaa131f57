"""The stages of a pipeline: their blocks and their devices, decided before any device is used."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from torch import nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules.memory import NgramTable
from mhc_lightning.modules.mixture_of_experts import MixtureOfExperts
from mhc_lightning.planning.tables import rows_per_token


@dataclass(frozen=True)
class ScheduleKind:
    """The requirements of a schedule.

    Attributes:
        engine_name: The schedule's class in `torch.distributed.pipelining`.
        stages_per_device: Fixed number of stages on each device, or None for two or more.
        v_shaped: Whether the devices' second stages are in reverse order, so that the first device
            also holds the last stage; otherwise stages go round the devices in a loop.
        splits_backward: Whether gradients of inputs and of weights are computed at different times.
        pairs_stages: Whether one stage of a device runs forward while the other runs backward.
    """

    engine_name: str
    stages_per_device: int | None = 1
    v_shaped: bool = False
    splits_backward: bool = False
    pairs_stages: bool = False


SCHEDULES = {
    "gpipe": ScheduleKind("GPipe"),
    "1f1b": ScheduleKind("1F1B"),
    "interleaved_1f1b": ScheduleKind("Interleaved1F1B", stages_per_device=None),
    "zbv": ScheduleKind("ZBVZeroBubble", 2, v_shaped=True, splits_backward=True),
    "dualpipev": ScheduleKind(
        "DualPipeV", 2, v_shaped=True, splits_backward=True, pairs_stages=True
    ),
}


@dataclass(frozen=True)
class StagePlan:
    """The stages of one pipeline.

    Attributes:
        schedule: A key of `SCHEDULES`.
        devices: Devices of one pipeline.
        blocks: The block numbers of each stage, from the first stage to the last.
    """

    schedule: str
    devices: int
    blocks: tuple[range, ...]

    @property
    def kind(self) -> ScheduleKind:
        """The requirements of the schedule."""
        return SCHEDULES[self.schedule]

    def device_of(self, stage: int) -> int:
        """The pipeline rank that holds a stage."""
        turn, place = divmod(stage, self.devices)
        return self.devices - 1 - place if self.kind.v_shaped and turn % 2 else place

    def stages_of(self, device: int) -> list[int]:
        """The stages that a pipeline rank holds, ascending."""
        return [s for s in range(len(self.blocks)) if self.device_of(s) == device]

    @property
    def last_device(self) -> int:
        """The pipeline rank that computes the loss."""
        return self.device_of(len(self.blocks) - 1)

    def check_micro_batches(self, count: int, batch: int) -> None:
        """Refuse a batch that cannot be cut, or too few parts for the schedule.

        Args:
            count: Micro-batches.
            batch: Sequences of one forward pass.

        Raises:
            UserError: The batch or the number does not fit; says which number would.
        """
        if count < 1:
            raise UserError(f"strategy.microbatches must be at least 1, or null, not {count}")
        if batch % count:
            raise UserError(
                f"data.micro_batch_size={batch} sequences cannot be cut into"
                f" strategy.microbatches={count} equal parts; use a divisor of {batch}"
            )
        least = {
            "1f1b": len(self.blocks),
            "interleaved_1f1b": self.devices,
            "dualpipev": len(self.blocks),
        }.get(self.schedule, 1)
        if count < least:
            raise UserError(
                f"strategy.schedule={self.schedule} with {len(self.blocks)} stages on"
                f" {self.devices} devices needs at least {least} micro-batches, not {count}; raise"
                " strategy.microbatches (and data.micro_batch_size, the sequences they are cut"
                " from), or use gpipe"
            )
        if self.schedule == "interleaved_1f1b" and count % (count // self.devices):
            raise UserError(
                f"strategy.schedule=interleaved_1f1b runs {count // self.devices} rounds of"
                f" micro-batches on {self.devices} devices, which do not divide"
                f" strategy.microbatches={count}; use a multiple of {self.devices}"
            )


def block_cost(module: nn.Module) -> float:
    """Relative time of a token in a module: the weights that multiply it; of a lookup, its rows.

    Of routed experts only the active share counts. Works on `meta`.
    """
    cost = 0.0
    for part in module.modules():
        own = [p.numel() for p in part.parameters(recurse=False) if p.dim() > 1]
        if isinstance(part, MixtureOfExperts):
            cost += sum(own) * part.num_active_experts / part.num_experts
        elif isinstance(part, nn.Embedding):
            cost += part.embedding_dim
        elif isinstance(part, NgramTable):
            cost += part.width * rows_per_token(part)
        else:
            cost += sum(own)
    return cost


def plan_stages(
    costs: Sequence[float],
    *,
    schedule: str,
    devices: int,
    before: float = 0.0,
    after: float = 0.0,
    blocks_per_stage: Sequence[int] | None = None,
) -> StagePlan:
    """Cut blocks into consecutive stages.

    Args:
        costs: Cost of each block.
        schedule: A key of `SCHEDULES`.
        devices: Devices of one pipeline.
        before: Cost of the first stage before its blocks (the embedding).
        after: Cost of the last stage after its blocks (the head).
        blocks_per_stage: Blocks of each stage. By default, the slowest stage is as fast as
            possible; among such cuts, the times differ least.

    Raises:
        UserError: The schedule does not exist, or the stages do not fit it or the blocks.
    """
    if schedule not in SCHEDULES:
        raise UserError(
            f"strategy.schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}"
        )
    per_device = SCHEDULES[schedule].stages_per_device
    if blocks_per_stage is None:
        count = devices * (per_device or 2)
    else:
        count = len(blocks_per_stage)
        fits = count % devices == 0 and count // devices == (per_device or max(2, count // devices))
        if not fits:
            needed = "two or more stages" if per_device is None else f"{per_device} stage(s)"
            raise UserError(
                f"strategy.schedule={schedule} needs {needed} on each of {devices} devices, but"
                f" strategy.blocks_per_stage lists {count} stages"
            )
        if min(blocks_per_stage) < 1 or sum(blocks_per_stage) != len(costs):
            raise UserError(
                f"strategy.blocks_per_stage={list(blocks_per_stage)} must be positive numbers with"
                f" the sum of model.num_layers={len(costs)}"
            )
    if count > len(costs):
        raise UserError(
            f"strategy.schedule={schedule} on {devices} devices makes {count} stages, but"
            f" model.num_layers={len(costs)} blocks fill at most as many; use fewer devices"
            " (strategy.pipeline_size) or more blocks"
        )
    sizes = blocks_per_stage or _balanced(costs, count, before, after)
    ends = [0, *accumulate(sizes)]
    return StagePlan(schedule, devices, tuple(range(a, b) for a, b in pairwise(ends)))


def cut_network(
    network: Any, *, schedule: str, devices: int, blocks_per_stage: Sequence[int] | None = None
) -> StagePlan:
    """The stages of a network, which may be on `meta`, by the predicted cost of its parts.

    Args:
        network: Has `blocks`, and names its `parts_before_blocks` and `parts_behind_blocks`.
        schedule: A key of `SCHEDULES`.
        devices: Devices of one pipeline.
        blocks_per_stage: See `plan_stages`.

    Raises:
        UserError: The network or the devices do not fit the schedule.
    """

    def cost(names: Sequence[str]) -> float:
        return sum(block_cost(getattr(network, name)) for name in names)

    return plan_stages(
        [block_cost(block) for block in network.blocks],
        schedule=schedule,
        devices=devices,
        before=cost(network.parts_before_blocks),
        after=cost(network.parts_behind_blocks),
        blocks_per_stage=blocks_per_stage,
    )


def _balanced(costs: Sequence[float], count: int, before: float, after: float) -> list[int]:
    """Blocks per stage: least maximum first, then least sum of squares."""
    last = len(costs)
    sums = [0.0, *accumulate(costs)]

    def time(stage: int, start: int, end: int) -> float:
        extra = (before if stage == 0 else 0) + (after if stage == count - 1 else 0)
        return sums[end] - sums[start] + extra

    def best(limit: float, *, squares: bool) -> tuple[float, list[int]]:
        # table[end]: the best cut of the blocks before `end` into the stages so far.
        table: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for stage in range(count):
            grown: dict[int, tuple[float, list[int]]] = {}
            for start, (value, sizes) in table.items():
                for end in range(start + 1, last - (count - 1 - stage) + 1):
                    took = time(stage, start, end)
                    score = value + took**2 if squares else max(value, took)
                    better = end not in grown or score < grown[end][0]
                    if took <= limit and better:
                        grown[end] = score, [*sizes, end - start]
            table = grown
        return table[last]

    slowest, _ = best(float("inf"), squares=False)
    return best(slowest, squares=True)[1]


def pipeline_size_of(devices: int, pipeline_size: int | None) -> int:
    """Devices of one pipeline; by default all devices.

    Raises:
        UserError: The devices are not a multiple of `pipeline_size`.
    """
    size = devices if pipeline_size is None else pipeline_size
    if size < 1 or devices % size:
        raise UserError(
            f"{devices} devices cannot be shared out into pipelines of"
            f" strategy.pipeline_size={size}; use a divisor of {devices}"
        )
    return size
