"""The times of a pipeline's stages, against the roofline of a whole step."""

from dataclasses import replace

import pytest

from mhc_lightning.planning import DataParallel, machine_of, precision_of
from mhc_lightning.planning.activations import MicroBatch
from mhc_lightning.planning.memory import device_memory
from mhc_lightning.planning.recompute import replayed_bytes
from mhc_lightning.planning.roofline import step_time
from mhc_lightning.planning.stage_times import stage_times, transfer_times
from mhc_lightning.planning.stages import cut_network

BATCH = MicroBatch(2, 64, precision_of("bf16-mixed"), True)


def times_of(model, schedule="gpipe", devices=1, batch=BATCH, blocks=None, **kind):
    plan = cut_network(model, schedule=schedule, devices=devices, blocks_per_stage=blocks)
    machine = machine_of("8xh200")
    machine = replace(machine, kind=replace(machine.kind, **kind))
    return stage_times(model, plan, batch, DataParallel(), machine)


@pytest.mark.parametrize("connection", ["residual", "mhc"])
@pytest.mark.parametrize(("schedule", "devices"), [("gpipe", 1), ("gpipe", 3), ("zbv", 2)])
def test_stages_together_take_what_the_step_does(connection, schedule, devices, build):
    model = build(connection, num_layers=5, num_experts=8, num_active_experts=2)
    machine = machine_of("h200")
    memory = device_memory(model, BATCH, DataParallel(), lambda model, parameter: 2)
    step = step_time(model, BATCH, DataParallel(), memory, machine, 1)
    bandwidth = machine.kind.bandwidth * machine.kind.bandwidth_share
    update = (2 * memory.weights + memory.gradients + 2 * memory.optimizer) / bandwidth
    stages = times_of(model, schedule, devices)
    together = sum(stage.forward + stage.backward for stage in stages)
    assert together == pytest.approx(step.total - update)


def test_the_products_of_the_head_are_in_its_forward_pass(build):
    few, many = (
        times_of(
            build("mhc", num_layers=4, vocab_size=size),
            devices=2,
            blocks=[2, 2],
            bandwidth=1e30,  # bytes cost nothing
        )
        for size in (100, 10000)
    )
    assert many[0].forward == pytest.approx(few[0].forward)
    assert [t.backward for t in many] == pytest.approx([t.backward for t in few])
    flops = 6 * (10000 - 100) * 32 * BATCH.tokens
    assert many[1].forward - few[1].forward == pytest.approx(flops / (0.6 * 989e12))


def test_the_first_stage_leaves_a_split_backward_to_its_second_half(build):
    first, second, *_ = times_of(build("mhc", num_layers=4), "zbv", 2)
    assert first.backward_weight == first.backward
    assert 0 < second.backward_weight < second.backward
    whole, *_ = times_of(build("mhc", num_layers=4), "gpipe", 2)
    assert 0 < whole.backward_weight < whole.backward


def test_replay_and_merges_move_bytes(build):
    machine = machine_of("h200").kind
    bandwidth = machine.bandwidth * machine.bandwidth_share
    model, batch = build("mhc", num_layers=4), replace(BATCH, recompute_block=2)
    stages = times_of(model, devices=2, batch=batch)
    # Blocks end where stages do.
    assert sum(stage.replay for stage in stages) == pytest.approx(
        replayed_bytes(model, batch) / bandwidth
    )
    vector = 32 * 2 * batch.tokens
    for stage in stages:  # two feed-forward sub-layers each, n = 4
        assert stage.merge_forward == pytest.approx(2 * 9 * vector / bandwidth)
        assert stage.merge_backward == pytest.approx(2 * 14 * vector / bandwidth)
    assert times_of(build("residual", num_layers=4))[0].merge_forward == 0


def test_streams_cross_the_link_between_the_devices_that_hold_them(build):
    model = build("mhc", num_layers=16)
    plan = cut_network(model, schedule="gpipe", devices=16)
    size = 4 * 32 * 2 * BATCH.tokens
    within, between = size / (450e9 * 0.7), size / (50e9 * 0.7)
    alone = transfer_times(model, plan, BATCH, DataParallel(), machine_of("16xh200"))
    assert alone == pytest.approx([within] * 7 + [between] + [within] * 7)
    # The devices of each pipeline follow each other, so that four lie as one does.
    shared = DataParallel(4, sharded=True, pipeline_size=16)
    several = transfer_times(model, plan, BATCH, shared, machine_of("64xh200"))
    assert several == alone
    # Pipelines of three do not all begin with a node: the slowest of them counts.
    three = cut_network(model, schedule="gpipe", devices=3)
    shared = DataParallel(8, sharded=True, pipeline_size=3)
    seconds = transfer_times(model, three, BATCH, shared, machine_of("24xh200"))
    assert seconds == pytest.approx([between] * 2)
    residual = build("residual", num_layers=16)
    single = transfer_times(residual, plan, BATCH, DataParallel(), machine_of("16xh200"))
    assert single[0] == pytest.approx(within / 4)
