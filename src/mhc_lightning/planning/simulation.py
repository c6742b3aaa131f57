"""Simulates one pass of a pipeline schedule: when each device runs which action.

Every device has three lanes. On `compute` the device runs the slots of its order one after the
other, each as soon as its inputs have arrived. On `communication` the device sends results to
neighbours, one at a time. On `priority` run the merges of feed-forward sub-layers (arXiv
2512.24880, figure 4).

Assumed in both modes:

- a stage takes as long for every micro-batch, and launching costs nothing;
- a transfer takes bytes over bandwidth, has no latency, and costs its receiver nothing; links work
  in both directions at once;
- streams are rebuilt before each backward action that needs them: a backward pass that is split in
  two rebuilds them twice, as autograd does.

Not overlapped, everything is on the critical path: a device does not compute while it sends,
rebuilding waits for the gradient, and a pair is a forward and then a backward.

Overlapped, as in the paper: transfers run beside computing. Rebuilding does not wait, because the
streams that entered a block are on the device already. In a pair, the merges of one pass run beside
the computing of the other: the pair takes as long as the busier of both lanes, and its results are
ready when it ends. If the wait for a gradient costs more than the pair saves, the two passes run
one after the other. Other operations of a pair share the device and gain nothing.

Where experts are spread over devices, a pass waits for its dispatches and combines. In a pair,
those of one pass travel while the other computes (`interleaved_pair.py`).

`torch.distributed.pipelining` lies between the two: it sends beside computing (1F1B waits for its
sends between a forward and a backward), and rebuilds when backward asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mhc_lightning.errors import UserError
from mhc_lightning.planning.interleaved_pair import interleave
from mhc_lightning.planning.schedule_order import Action, Order, PassKind, Slot
from mhc_lightning.planning.stages import StagePlan
from mhc_lightning.planning.timeline import Activity, Lane, Span, Timeline


@dataclass(frozen=True)
class StageTimes:
    """Seconds that a stage takes for one micro-batch.

    Attributes:
        forward: The forward pass, merges included.
        backward: The whole backward pass, merges included, nothing rebuilt.
        backward_weight: The part of `backward` that computes gradients of weights. None if it is
            not known: then schedules that split the backward pass cannot be simulated.
        replay: Rebuilding streams in backward.
        merge_forward: The part of `forward` that merges of feed-forward sub-layers take.
        merge_backward: The part of `backward` that these merges take.
        dispatch: Sending tokens to experts on other devices, forward; backward takes as long. It is
            no part of `forward` or `backward`.
        combine: Sending their results back, forward; backward takes as long.
        expert_layers: Layers over which the two are spread.
        feed_forward: The share of feed-forward sub-layers in `forward` and `backward`.
    """

    forward: float
    backward: float
    backward_weight: float | None = None
    replay: float = 0.0
    merge_forward: float = 0.0
    merge_backward: float = 0.0
    dispatch: float = 0.0
    combine: float = 0.0
    expert_layers: int = 1
    feed_forward: float = 0.5

    def exchange(self, kind: PassKind) -> float:
        """Seconds of an action's all-to-alls.

        They belong to the gradients of inputs, unless all of backward is in its second half.
        """
        whole = self.backward_weight == self.backward
        none = PassKind.BACKWARD_INPUT if whole else PassKind.BACKWARD_WEIGHT
        return 0.0 if kind is none else self.dispatch + self.combine

    def of(self, kind: PassKind) -> float:
        """Seconds of an action, without rebuilding.

        Raises:
            UserError: Only the whole backward pass is known.
        """
        if kind is PassKind.FORWARD:
            return self.forward
        if kind is PassKind.BACKWARD:
            return self.backward
        if self.backward_weight is None:
            raise UserError(
                "a schedule that splits the backward pass needs backward_weight beside backward in"
                " the times of every stage"
            )
        weight = self.backward_weight
        return weight if kind is PassKind.BACKWARD_WEIGHT else self.backward - weight


_WORK = {
    PassKind.FORWARD: Activity.FORWARD,
    PassKind.BACKWARD: Activity.BACKWARD,
    PassKind.BACKWARD_INPUT: Activity.BACKWARD_INPUT,
    PassKind.BACKWARD_WEIGHT: Activity.BACKWARD_WEIGHT,
}


def simulate(
    plan: StagePlan,
    order: Order,
    times: Sequence[StageTimes],
    transfers: Sequence[float],
    *,
    overlapped: bool,
) -> Timeline:
    """Run every device through its order.

    Args:
        plan: The stages, and the device of each.
        order: The result of `schedule_order`.
        times: Times of each stage.
        transfers: Seconds to send a micro-batch from each stage but the last, and its gradient
            back; transfers between stages on the same device take no time.
        overlapped: True for the overlapped mode.

    Raises:
        UserError: The schedule splits the backward pass, and the times do not.
    """
    run = _Simulation(plan, times, transfers, overlapped)
    left = [list(reversed(slots)) for slots in order]
    while any(left):
        before = sum(map(len, left))
        for device, slots in enumerate(left):
            while slots and run.ready(slots[-1]):
                run.take(device, slots.pop())
        if sum(map(len, left)) == before:
            raise ValueError(f"devices wait for each other: {[slots[-1:] for slots in left]}")
    return Timeline(tuple(run.spans), plan.devices, overlapped, tuple(run.exposed))


class _Simulation:
    """The state of a simulation."""

    def __init__(
        self,
        plan: StagePlan,
        times: Sequence[StageTimes],
        transfers: Sequence[float],
        overlapped: bool,
    ) -> None:
        self.spans: list[Span] = []
        self.exposed = [0.0] * plan.devices
        self._plan = plan
        self._last = len(plan.blocks) - 1
        self._times = times
        self._transfers = transfers
        self._overlapped = overlapped
        self._free = [0.0] * plan.devices  # time from which each device is idle
        self._link_free = [0.0] * plan.devices
        self._there: dict[tuple[bool, int, int], float] = {}  # (forward, stage, micro-batch)

    def ready(self, slot: Slot) -> bool:
        """True if the arrival times of all inputs of a slot are known."""
        return all(self._input(action) is not None for action in slot)

    def take(self, device: int, slot: Slot) -> None:
        """Run the next slot of a device."""
        if self._overlapped:
            self._rebuild(device, slot)
            if len(slot) > 1:
                self._pair(device, slot)
                return
        ends = []
        for action in slot:
            start = max(self._free[device], self._input(action) or 0.0)
            if not self._overlapped:
                self._free[device] = start
                self._rebuild(device, (action,))
                start = self._free[device]
            self._compute(device, action, start, self._seconds(action))
            self._exchange(device, action)
            ends.append(self._free[device])
        for action, end in zip(slot, ends, strict=True):
            self._hand_on(device, action, end)

    def _input(self, action: Action) -> float | None:
        kind, stage, micro_batch = action
        if kind is PassKind.BACKWARD_WEIGHT or (kind is PassKind.FORWARD and stage == 0):
            return 0.0
        return self._there.get((kind is PassKind.FORWARD, stage, micro_batch))

    def _seconds(self, action: Action) -> float:
        return self._times[action.stage].of(action.kind)

    def _rebuild(self, device: int, slot: Slot) -> None:
        for action in slot:
            replay = self._times[action.stage].replay
            # An action without time has no backward computation, and needs no streams.
            if action.kind is not PassKind.FORWARD and self._seconds(action) > 0:
                self._add(device, Lane.COMPUTE, Activity.REPLAY, action, self._free[device], replay)
                self._free[device] += replay

    def _compute(self, device: int, action: Action, start: float, seconds: float) -> None:
        self._add(device, Lane.COMPUTE, _WORK[action.kind], action, start, seconds)
        self._free[device] = start + seconds

    def _exchange(self, device: int, action: Action) -> None:
        """All-to-alls that nothing hides: drawn behind their action, as one."""
        seconds = self._times[action.stage].exchange(action.kind)
        lane, start = (Lane.COMMUNICATION, Activity.EXCHANGE), self._free[device]
        self._add(device, *lane, action, start, seconds)
        self._free[device] += seconds
        self.exposed[device] += seconds

    def _pair(self, device: int, pair: Slot) -> None:
        forward, backward = pair
        free, (of_forward, of_backward) = self._free[device], map(self._input, pair)
        seconds_forward, seconds_backward = map(self._seconds, pair)
        merge_forward = self._times[forward.stage].merge_forward
        merge_backward = self._times[backward.stage].merge_backward
        hidden = merge_forward + merge_backward
        both = seconds_forward + seconds_backward - hidden
        layers = interleave(self._times[forward.stage], self._times[backward.stage])
        start = max(free, of_forward or 0.0, of_backward or 0.0)
        end = start + max(both, hidden, layers.seconds)
        alone = max(free, of_forward or 0.0)
        sent_forward = self._times[forward.stage].exchange(forward.kind)
        sent_backward = self._times[backward.stage].exchange(backward.kind)
        then = max(alone + seconds_forward + sent_forward, of_backward or 0.0)
        # Whether waiting for the gradient costs more than a pair saves.
        if then + seconds_backward + sent_backward <= end:
            self._compute(device, forward, alone, seconds_forward)
            self._exchange(device, forward)
            self._compute(device, backward, then, seconds_backward)
            self._exchange(device, backward)
            end = self._free[device]
        else:
            for span in layers.exchanges:
                whose = forward if span.forward else backward
                lane = Lane.COMMUNICATION, Activity.EXCHANGE
                self._add(device, *lane, whose, start + span.start, span.end - span.start)
            self.exposed[device] += max(0.0, layers.seconds - max(both, hidden))
            self._compute(device, forward, start, seconds_forward - merge_forward)
            middle = self._free[device]
            self._compute(device, backward, middle, seconds_backward - merge_backward)
            merge = Lane.PRIORITY, Activity.MERGE
            self._add(device, *merge, backward, start, merge_backward)
            self._add(device, *merge, forward, end - merge_forward, merge_forward)
            self._free[device] = end
        for action in pair:
            self._hand_on(device, action, end)

    def _hand_on(self, device: int, action: Action, end: float) -> None:
        kind, stage, micro_batch = action
        forward = kind is PassKind.FORWARD
        if forward and stage == self._last:
            self._there[False, stage, micro_batch] = end
        if kind is PassKind.BACKWARD_WEIGHT or stage == (self._last if forward else 0):
            return
        to = stage + 1 if forward else stage - 1
        if self._plan.device_of(to) != device:
            seconds = self._transfers[min(stage, to)]
            start = max(end, self._link_free[device])
            if not self._overlapped:
                start = self._free[device]
                self._free[device] += seconds
            self._add(device, Lane.COMMUNICATION, Activity.SEND, action, start, seconds)
            end = self._link_free[device] = start + seconds
        self._there[forward, to, micro_batch] = end

    def _add(
        self, device: int, lane: Lane, work: Activity, action: Action, start: float, seconds: float
    ) -> None:
        if seconds > 0:
            self.spans.append(Span(device, lane, work, action, start, start + seconds))
