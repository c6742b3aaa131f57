"""The order in which each device of a pipeline runs its actions, taken from torch's own schedules.

A schedule of `torch.distributed.pipelining` is built around stages that only record the calls they
get. So the simulation follows the order that really runs, and no process group is needed.
"""

from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

from mhc_lightning.planning.stages import StagePlan


class PassKind(StrEnum):
    """The pass that a device runs for a micro-batch on a stage; the values are torch's letters."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


class Action(NamedTuple):
    """A pass of one micro-batch through one stage.

    Attributes:
        kind: The pass.
        stage: Number of the stage.
        micro_batch: Number of the micro-batch, from 0.
    """

    kind: PassKind
    stage: int
    micro_batch: int


Slot = tuple[Action, ...]
"""One action, or a forward and a backward that a schedule pairs, so that each hides the other's
communication (`OVERLAP_F_B`)."""

Order = tuple[tuple[Slot, ...], ...]
"""The slots of each device, in order."""


@lru_cache(maxsize=64)
def schedule_order(plan: StagePlan, micro_batches: int) -> Order:
    """The order of a training step.

    Args:
        plan: The stages and their schedule.
        micro_batches: Parts that a batch is cut into; as many as `plan` accepts.
    """
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

    cls: Any = get_schedule_class(plan.kind.engine_name)
    if issubclass(cls, PipelineScheduleSingle):
        return tuple(_run_single(cls, plan, s, micro_batches) for s in range(plan.devices))
    stages = [_Scribe(plan, stage) for stage in plan.stages_of(0)]
    actions = cls(stages, micro_batches).pipeline_order
    return tuple(
        tuple(_slot(action) for action in actions[device] if action is not None)
        for device in range(plan.devices)
    )


def in_flight(slots: Sequence[Slot]) -> int:
    """Largest number of forward passes of a device that wait for their backward pass."""
    held = most = 0
    for action in (action for slot in slots for action in slot):
        if action.kind is PassKind.FORWARD:
            held += 1
            most = max(most, held)
        elif action.kind is not PassKind.BACKWARD_INPUT:
            held -= 1
    return most


def _slot(action: Any) -> Slot:
    parts = [action] if action.sub_actions is None else action.sub_actions
    return tuple(
        Action(PassKind(part.computation_type.value), part.stage_index, part.microbatch_index)
        for part in parts
    )


def _run_single(cls: Any, plan: StagePlan, stage: int, micro_batches: int) -> tuple[Slot, ...]:
    """The slots of a schedule with one stage per device, recorded from a run of it.

    (In training, torch does not use such a schedule's `pipeline_order`, which is off by one for
    the last stage under 1F1B.)
    """
    scribe = _Scribe(plan, stage)
    schedule = cls(scribe, micro_batches)
    schedule._initialize_stage = lambda *arguments: None
    schedule._step_microbatches()
    return tuple((action,) for action in scribe.written)


class _Scribe:
    """Records the calls of a schedule in place of a stage; computes and sends nothing."""

    submod = None
    has_backward = True

    def __init__(self, plan: StagePlan, stage: int) -> None:
        self.stage_index = stage
        self.num_stages = len(plan.blocks)
        self.is_first, self.is_last = stage == 0, stage == self.num_stages - 1
        self.group_size = plan.devices
        self.group_rank = plan.device_of(stage)
        self.written: list[Action] = []

    def forward_one_chunk(self, micro_batch: int, *args: Any, **kwargs: Any) -> None:
        self.written.append(Action(PassKind.FORWARD, self.stage_index, micro_batch))

    def backward_one_chunk(self, micro_batch: int, **kwargs: Any) -> None:
        self.written.append(Action(PassKind.BACKWARD, self.stage_index, micro_batch))

    def _no_messages(self, micro_batch: int) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = _no_messages

    def perform_reduce_grad(self, scale: int) -> None:
        """Do nothing: there are no gradients to reduce."""
