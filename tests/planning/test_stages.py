"""The cut into stages and what is refused before any process is there."""

import itertools
from functools import partial
from typing import Any

import pytest
from networks import tiny_transformer

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Engram
from mhc_lightning.planning.stages import (
    SCHEDULES,
    StagePlan,
    block_cost,
    pipeline_size_of,
    plan_stages,
)


def plan(schedule: str, devices: int, blocks: int = 8, **changes: Any) -> StagePlan:
    return plan_stages([1.0] * blocks, schedule=schedule, devices=devices, **changes)


def test_the_slowest_stage_is_as_fast_as_any_cut_makes_it() -> None:
    costs, before, after = [1, 3, 2, 2, 5, 1, 4], 0.5, 2.5
    for count in range(1, len(costs) + 1):
        cuts = itertools.combinations(range(1, len(costs)), count - 1)

        def times(ends: tuple[int, ...], count: int = count) -> list[float]:
            edges = [0, *ends, len(costs)]
            parts = [float(sum(costs[a:b])) for a, b in itertools.pairwise(edges)]
            parts[0] += before
            parts[-1] += after
            return parts

        best = min((max(t), sum(x**2 for x in t)) for t in map(times, cuts))
        blocks = plan_stages(
            costs, schedule="gpipe", devices=count, before=before, after=after
        ).blocks
        ours = times(tuple(b.stop for b in blocks[:-1]))
        assert (max(ours), sum(x**2 for x in ours)) == best
        assert [k for stage in blocks for k in stage] == list(range(len(costs)))


def test_a_heavy_head_takes_blocks_from_the_last_stage(tiny_transformer) -> None:
    network = tiny_transformer(num_layers=6, vocab_size=1200)
    dense, experts = (block_cost(network.blocks[k]) for k in (0, 1))
    routed = network.blocks[1].feed_forward.body
    inactive = (routed.gate_up.numel() + routed.down.numel()) / 2
    router = routed.router.weight.numel()
    assert experts == pytest.approx(dense + router), "an expert block's dense part is as wide"
    assert block_cost(network) == pytest.approx(
        sum(p.numel() for p in network.parameters() if p.dim() > 1)
        - 5 * inactive
        - 1199 * 16  # one row of the embedding is read
    )
    cut = plan_stages(
        [block_cost(b) for b in network.blocks],
        schedule="1f1b",
        devices=2,
        before=block_cost(network.embedding),
        after=block_cost(network.output),
    )
    assert [len(stage) for stage in cut.blocks] == [4, 2]


def test_stages_lie_in_a_loop_or_a_v() -> None:
    loop, v = plan("interleaved_1f1b", 2), plan("dualpipev", 2)
    assert [loop.device_of(s) for s in range(4)] == [0, 1, 0, 1]
    assert [v.device_of(s) for s in range(4)] == [0, 1, 1, 0]
    assert (loop.last_device, v.last_device) == (1, 0)
    assert v.stages_of(0) == [0, 3]
    assert [len(b) for b in plan("1f1b", 2, blocks_per_stage=[3, 5]).blocks] == [3, 5]


def test_what_cannot_run_is_refused() -> None:
    def refusal(call, *args: object, **kwargs: object) -> str:
        with pytest.raises(UserError) as caught:
            call(*args, **kwargs)
        return str(caught.value)

    assert "one of gpipe, 1f1b" in refusal(plan, "chimera", 2)
    assert "makes 16 stages" in refusal(plan, "zbv", 8)
    assert "needs 2 stage(s)" in refusal(plan, "zbv", 2, blocks_per_stage=[4, 4])
    assert "two or more" in refusal(plan, "interleaved_1f1b", 2, blocks_per_stage=[4, 4])
    assert "sum of model.num_layers=8" in refusal(plan, "1f1b", 2, blocks_per_stage=[4, 5])
    assert "divisor of 6" in refusal(pipeline_size_of, 6, 4)
    assert pipeline_size_of(6, None) == 6
    two_v = plan("dualpipev", 2)
    assert "at least 4 micro-batches" in refusal(two_v.check_micro_batches, 2, 8)
    assert "at least 2" in refusal(plan("1f1b", 2).check_micro_batches, 1, 8)
    assert "3 rounds" in refusal(plan("interleaved_1f1b", 2).check_micro_batches, 7, 7)
    assert "divisor of 6" in refusal(two_v.check_micro_batches, 4, 6)
    for name in SCHEDULES:
        plan(name, 2).check_micro_batches(4, 8)


def test_a_memory_costs_its_projections_and_the_rows_it_reads() -> None:
    block = tiny_transformer(num_layers=1, num_dense_layers=1).blocks[0]
    memory = partial(Engram, rows=1000, layers=[0], num_heads=2, dim=8)
    with_memory = tiny_transformer(num_layers=1, num_dense_layers=1, memory=memory).blocks[0]
    # Four heads of four values; keys of four streams and a value.
    assert block_cost(with_memory) == block_cost(block) + 5 * 16 * 16 + 16
