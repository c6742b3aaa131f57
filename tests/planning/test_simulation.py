"""The simulator against published formulas, and what must hold for any times."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timelines import idle, stages, timeline

from mhc_lightning.errors import UserError
from mhc_lightning.planning.schedule_order import PassKind, in_flight, schedule_order
from mhc_lightning.planning.simulation import StageTimes
from mhc_lightning.planning.stages import SCHEDULES
from mhc_lightning.planning.timeline import Activity, Lane

SHAPES = [(2, 4), (3, 7), (4, 8), (4, 12), (8, 17)]  # devices, micro-batches


@pytest.mark.parametrize(("devices", "micro_batches"), SHAPES)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_bubble_of_one_stage_per_device(schedule, devices, micro_batches):
    """(p - 1)(F + B), a share (p - 1) / (m + p - 1): arXiv 2104.04473, section 2.2."""
    line = timeline(stages(schedule, devices), micro_batches, StageTimes(1.0, 2.3))
    assert idle(line) == pytest.approx([(devices - 1) * 3.3] * devices)
    assert line.bubble == pytest.approx((devices - 1) / (micro_batches + devices - 1))


@pytest.mark.parametrize("per_device", [2, 3])
@pytest.mark.parametrize(("devices", "micro_batches"), [(2, 4), (3, 6), (4, 12)])
def test_interleaving_divides_the_bubble(devices, micro_batches, per_device):
    """(p - 1)(F + B) / v, where F and B are a device's: arXiv 2104.04473, section 2.2."""
    plan = stages("interleaved_1f1b", devices, per_device)
    line = timeline(plan, micro_batches, StageTimes(1.0 / per_device, 2.3 / per_device))
    assert idle(line) == pytest.approx([(devices - 1) * 3.3 / per_device] * devices)


@pytest.mark.parametrize(("devices", "micro_batches"), SHAPES)
def test_zbv_has_no_bubble_where_all_three_take_as_long(devices, micro_batches):
    """arXiv 2401.10241: zero for T_F = T_B = T_W, when nothing synchronises the devices' steps.

    A device then never waits between its first action and its last. Here steps begin together, so
    that the last device still waits for its first input.
    """
    line = timeline(stages("zbv", devices), micro_batches, StageTimes(1.0, 2.0, 1.0))
    for device in range(devices):
        own = [span for span in line.spans if span.device == device]
        lasts = max(span.end for span in own) - min(span.start for span in own)
        assert lasts == pytest.approx(line.busy(device)) == pytest.approx(6.0 * micro_batches)
    assert idle(line) == pytest.approx([devices - 1.0] * devices)
    unequal = timeline(stages("zbv", devices), micro_batches, StageTimes(1.0, 2.4, 1.0))
    assert max(idle(unequal)) > 1.3 * (devices - 1)


@pytest.mark.parametrize(("devices", "micro_batches"), [(2, 4), (3, 7), (4, 8), (8, 17)])
@pytest.mark.parametrize("weight", [0.25, 0.8, 1.0])
def test_bubble_of_dualpipev(devices, micro_batches, weight):
    """(PP/2 - 1)(F&B + B - 3W) for PP stages, as the README of deepseek-ai/DualPipe has it.

    In torch's order of the schedule that is exact where a forward pass takes as long as the
    gradients of inputs, and weights' no longer; nothing hidden, a pair takes F + B.
    """
    forward, backward = 1.0, 1.0 + weight
    line = timeline(
        stages("dualpipev", devices), micro_batches, StageTimes(forward, backward, weight)
    )
    bubble = (devices - 1) * (forward + backward + backward - 3 * weight)
    assert idle(line) == pytest.approx([bubble] * devices)


def test_micro_batches_in_flight():
    devices, count = 4, 12
    held = {
        name: [in_flight(slots) for slots in schedule_order(plan, count)]
        for name, plan in ((name, stages(name, devices)) for name in SCHEDULES)
    }
    assert held["gpipe"] == [count] * devices
    assert held["1f1b"] == [4, 3, 2, 1]
    # 2 (p - 1 - rank) + (v - 1) p forwards of warm-up, and one more before a backward.
    assert held["interleaved_1f1b"] == [2 * (3 - rank) + 4 + 1 for rank in range(devices)]
    # 2 p of half a device's blocks: as much as 1F1B's first device (arXiv 2401.10241, section 6).
    assert held["zbv"] == [2 * devices] * devices
    # PP + 1 of PP = 2 p stages (README of deepseek-ai/DualPipe).
    assert held["dualpipev"] == [2 * devices + 1] * devices


def test_what_is_not_split_cannot_be_taken_apart():
    with pytest.raises(UserError, match="backward_weight"):
        timeline(stages("zbv", 2), 4, StageTimes(1.0, 2.0))


def test_transfers_and_rebuilding_hide_where_they_overlap():
    plan = stages("1f1b", 4)
    plain, rebuilt = StageTimes(1.0, 2.0, 1.0), StageTimes(1.0, 2.0, 1.0, replay=0.3)
    bare = timeline(plan, 8, plain).seconds
    seconds = {
        overlapped: timeline(plan, 8, rebuilt, [0.2] * 3, overlapped=overlapped).seconds
        for overlapped in (True, False)
    }
    # The first device is the last to finish: 8 replays are its own whatever is hidden.
    assert bare + 8 * 0.3 < seconds[True] < seconds[False]
    late = timeline(plan, 8, rebuilt, [0.2] * 3, overlapped=False)
    assert late.sending(0) == pytest.approx(8 * 0.2) and late.sending(1) == pytest.approx(16 * 0.2)


def test_merges_of_a_pair_run_beside_the_other_of_it():
    plan = stages("dualpipev", 2)
    without = timeline(plan, 8, StageTimes(1.0, 2.0, 1.0)).seconds
    merging = StageTimes(1.0, 2.0, 1.0, merge_forward=0.1, merge_backward=0.2)
    pairs = min(sum(len(slot) == 2 for slot in device) for device in schedule_order(plan, 8))
    assert timeline(plan, 8, merging).seconds <= without - pairs * 0.3 + 1e-9
    assert timeline(plan, 8, merging, overlapped=False).seconds == pytest.approx(without)


seconds = st.floats(0.01, 10.0)


@st.composite
def pipelines(draw):
    schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    devices = draw(st.integers(2, 4))
    plan = stages(schedule, devices)
    # A multiple of the devices suits the interleaved schedule, and twice as many every schedule.
    micro_batches = devices * draw(st.integers(2, 4))
    times = []
    for _ in plan.blocks:
        forward, into, weight = draw(seconds), draw(seconds), draw(seconds)
        share = draw(st.floats(0, 0.9))
        replay = draw(st.floats(0, 1))
        times.append(
            StageTimes(forward, into + weight, weight, replay, share * forward, share * into)
        )
    transfers = [draw(st.floats(0, 3)) for _ in plan.blocks[1:]]
    return plan, micro_batches, times, transfers


@settings(deadline=None, max_examples=60)
@given(pipelines(), st.booleans())
def test_any_pipeline_obeys_its_dependencies_and_loses_no_work(pipeline, overlapped):
    plan, micro_batches, times, transfers = pipeline
    line = timeline(plan, micro_batches, times, transfers, overlapped=overlapped)
    last = len(plan.blocks) - 1

    lanes: dict[tuple, list[tuple[float, float]]] = {}
    for span in line.spans:
        assert 0 <= span.start <= span.end <= line.seconds
        lanes.setdefault((span.device, span.lane), []).append((span.start, span.end))
    for spans in lanes.values():  # a lane does one thing at a time
        spans.sort()
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans))

    ends = {  # of whatever makes the result of an action, its merges included
        key: max(s.end for s in line.spans if s.action == key and s.work is not Activity.SEND)
        for key in {span.action for span in line.spans}
    }
    starts = {
        span.action: span.start
        for span in line.spans
        if span.lane is Lane.COMPUTE and span.work is not Activity.REPLAY
    }
    sent = {span.action: span for span in line.spans if span.work is Activity.SEND}
    for action, start in starts.items():
        kind, stage, micro_batch = action
        if kind is PassKind.BACKWARD_WEIGHT:
            needed = [a for a in ends if a[0] is PassKind.BACKWARD_INPUT and a[1:] == action[1:]]
        elif kind is PassKind.FORWARD:
            needed = [a for a in ends if a == (PassKind.FORWARD, stage - 1, micro_batch)]
        else:
            after = (stage + 1, micro_batch)
            backward = (PassKind.BACKWARD, PassKind.BACKWARD_INPUT)
            needed = [a for a in ends if a[0] in backward and a[1:] == after]
            if stage == last:
                needed = [a for a in ends if a == (PassKind.FORWARD, stage, micro_batch)]
        assert len(needed) == (kind is not PassKind.FORWARD or stage > 0)
        for before in needed:
            assert ends[before] <= start + 1e-9
            if before in sent and kind is not PassKind.BACKWARD_WEIGHT:
                assert sent[before].start >= ends[before] - 1e-9
                assert sent[before].end <= start + 1e-9

    spent: Counter[int] = Counter()
    for span in line.spans:
        if span.work not in (Activity.SEND, Activity.REPLAY):
            spent[span.action.stage] += span.end - span.start
    for stage, time in enumerate(times):
        assert spent[stage] == pytest.approx(micro_batches * (time.forward + time.backward))
    for device in range(plan.devices):
        assert line.busy(device) + line.sending(device) <= line.seconds + 1e-9
    assert -1e-9 <= line.bubble < 1
    # Any micro-batch goes down and up the whole pipeline.
    through = sum(time.forward - time.merge_forward for time in times) + sum(
        time.of(PassKind.BACKWARD_INPUT) - time.merge_backward for time in times
    )
    assert line.seconds >= through - 1e-9


@settings(deadline=None, max_examples=30)
@given(pipelines(), st.booleans(), st.floats(1.0, 3.0), st.data())
def test_nothing_ends_sooner_when_something_takes_longer(pipeline, overlapped, factor, data):
    plan, micro_batches, times, transfers = pipeline
    before = timeline(plan, micro_batches, times, transfers, overlapped=overlapped).seconds
    number = data.draw(st.integers(0, len(times) - 1))
    slow = times[number]
    longer = StageTimes(
        slow.forward * factor,
        slow.backward * factor,
        slow.backward_weight * factor,
        slow.replay * factor,
        slow.merge_forward,
        slow.merge_backward,
    )
    slower = [*times[:number], longer, *times[number + 1 :]]
    after = timeline(plan, micro_batches, slower, transfers, overlapped=overlapped).seconds
    assert after >= before - 1e-9
    worse = [seconds * factor for seconds in transfers]
    assert timeline(plan, micro_batches, times, worse, overlapped=overlapped).seconds >= (
        before - 1e-9
    )
    if not overlapped:
        hidden = timeline(plan, micro_batches, times, transfers, overlapped=True).seconds
        assert hidden <= before + 1e-9
