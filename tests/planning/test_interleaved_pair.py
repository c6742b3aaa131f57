"""A forward and a backward pass interleaved by layer: the order, and what it hides."""

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timelines import idle, stages, timeline

from mhc_lightning.planning.interleaved_pair import COMPUTED, SENT, Op, interleave
from mhc_lightning.planning.simulation import StageTimes
from mhc_lightning.planning.timeline import Activity, Lane

SECONDS = st.floats(0.01, 2.0)


def stage(forward=2.0, weight=2.0, sent=0.5, layers=4, share=0.5, **more):
    return StageTimes(forward, forward + weight, weight, dispatch=sent, combine=sent,
                      expert_layers=layers, feed_forward=share, **more)  # fmt: skip


TIMES = st.builds(stage, SECONDS, SECONDS, SECONDS, st.integers(1, 5), st.floats(0.1, 0.9))


def spans_of(pair):
    found: dict = defaultdict(dict)
    for span in pair.spans:
        found[span.layer][span.op] = span
    return found


@settings(deadline=None, max_examples=60)
@given(TIMES, TIMES)
def test_every_all_to_all_is_between_what_makes_it_and_what_needs_it(forward, backward):
    pair = interleave(forward, backward)
    for layer, ops in spans_of(pair).items():
        for chain in (
            (Op.ATTENTION_F, Op.DISPATCH_F, Op.EXPERTS_F, Op.COMBINE_F),
            (Op.COMBINE_B, Op.EXPERTS_B, Op.DISPATCH_B, Op.ATTENTION_B),
        ):
            if chain[0] in ops:
                for before, after in pairwise(chain):
                    assert ops[before].end <= ops[after].start + 1e-9, (layer, before, after)
    for lane in (COMPUTED, SENT):
        own = [span for span in pair.spans if span.op in lane]
        assert [s.op for s in own if s.layer == 0] == [op for op in lane if op in spans_of(pair)[0]]
        for one, other in pairwise(own):
            assert one.end <= other.start + 1e-9
    computed = forward.forward + backward.backward
    sent = 2 * forward.dispatch + 2 * backward.dispatch
    assert max(computed, sent) - 1e-9 <= pair.seconds <= computed + sent + 1e-9


def test_a_pass_hides_the_others_all_to_alls_but_for_the_first_and_the_last():
    one = stage(sent=0.4)
    pair = interleave(one, one)
    computed, sent = 2.0 + 4.0, 4 * 0.4
    # The first combine of backward is behind attention; only the last of forward is in view.
    assert pair.seconds == pytest.approx(computed)
    assert sum(span.end - span.start for span in pair.exchanges) == pytest.approx(sent)
    # As much communication as computation: a little is in view, and far from all of it.
    even = stage(sent=1.5)
    assert computed < interleave(even, even).seconds < 1.35 * computed
    assert interleave(StageTimes(1.0, 2.0), StageTimes(1.0, 2.0)).seconds == 0


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipev"])
def test_without_overlap_every_pass_waits_for_its_all_to_alls(schedule):
    plan, count = stages(schedule, 4), 12
    one = stage(layers=2)
    line = timeline(plan, count, one, overlapped=False)
    held = len(plan.stages_of(1))
    assert line.exposed == pytest.approx([count * held * 2 * 1.0] * 4)
    plain = timeline(plan, count, StageTimes(2.0, 4.0, 2.0), overlapped=False)
    assert line.seconds > plain.seconds + line.exposed[0] - 1e-9
    used = sum(line.busy(d) + line.exposed[d] for d in range(4))
    assert line.bubble == pytest.approx(1 - used / (4 * line.seconds))


def test_only_pairs_hide_all_to_alls():
    one, count = stage(sent=0.4, layers=2), 24
    exposed = {}
    for schedule in ("zbv", "dualpipev"):
        line = timeline(stages(schedule, 4), count, one, overlapped=True)
        exposed[schedule] = max(line.exposed)
        drawn = [s for s in line.spans if s.work is Activity.EXCHANGE]
        assert {s.lane for s in drawn} == {Lane.COMMUNICATION}
        sent = sum(s.end - s.start for s in drawn)
        assert sent == pytest.approx(8 * count * 4 * 0.4)
    assert exposed["zbv"] == pytest.approx(2 * count * 4 * 0.4)
    assert exposed["dualpipev"] < 0.35 * exposed["zbv"]
    plan = stages("dualpipev", 4)
    slow, fast = (timeline(plan, count, one, overlapped=each).seconds for each in (False, True))
    alone = timeline(plan, count, StageTimes(2.0, 4.0, 2.0)).seconds
    assert alone <= fast < slow


@pytest.mark.parametrize(("devices", "micro_batches"), [(2, 8), (4, 8), (4, 20), (8, 16)])
def test_dualpipes_bubble(devices, micro_batches):
    """(PP/2 - 1)(F&B + B - 3W), on PP/2 devices with two stages each: arXiv 2412.19437, table 2."""
    forward, backward, weight = 1.0, 2.0, 1.0
    times = StageTimes(forward, backward, weight)
    line = timeline(stages("dualpipev", devices), micro_batches, times)
    bubble = (devices - 1) * (forward + backward + backward - 3 * weight)
    assert idle(line) == pytest.approx([bubble] * devices)
