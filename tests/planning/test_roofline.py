"""The time of a step: what it grows with."""

from dataclasses import replace

import pytest

from mhc_lightning.planning import DataParallel, PlannedRun, machine_of, make_plan, precision_of
from mhc_lightning.planning.recompute import replayed_bytes


def planned(model, machine="h200", **changes):
    settings = {
        "batch_size": 64,
        "micro_batch_size": 2,
        "sequence_length": 128,
        "max_steps": 1000,
        "precision": precision_of("bf16-mixed"),
        "replicas": DataParallel(),
        "state_per_value": lambda model, parameter: 2,
    }
    return make_plan(model, PlannedRun(**{**settings, **changes}), machine_of(machine))


def test_arithmetic_takes_flops_over_the_share_of_the_peak(build):
    model = build("mhc")
    plan = planned(model)
    flops = model.flops_per_token(128) * 64 * 128
    assert plan.step_seconds.compute == pytest.approx(flops / (0.6 * 989e12))
    full = planned(model, precision=precision_of("32-true"))
    assert full.step_seconds.compute == pytest.approx(flops / (0.6 * 67e12))
    assert plan.tokens_per_second == pytest.approx(64 * 128 / plan.step_seconds.total)
    assert plan.tokens == 64 * 128 * 1000
    assert plan.days == pytest.approx(plan.tokens / plan.tokens_per_second / 86400)


def test_streams_cost_time_and_fewer_larger_micro_batches_save_some(build):
    residual, mhc = planned(build("residual")), planned(build("mhc"))
    assert mhc.step_seconds.traffic > residual.step_seconds.traffic
    larger = planned(build("mhc"), micro_batch_size=8)
    assert larger.run.micro_batches == 8
    assert larger.step_seconds.traffic < mhc.step_seconds.traffic


def test_replicas_reduce_gradients_once_and_shards_gather_for_each_micro_batch(build):
    model = build("mhc")
    size = sum(p.numel() for p in model.parameters())
    replicas = planned(model, "4xh200", replicas=DataParallel(4)).step_seconds
    assert replicas.communication == pytest.approx(2 * 3 / 4 * size * 4 / (0.7 * 450e9))
    shards = planned(model, "4xh200", replicas=DataParallel(4, sharded=True)).step_seconds
    assert shards.communication == pytest.approx(8 * 3 / 4 * size * (2 + 2 + 4) / (0.7 * 450e9))
    assert shards.total >= shards.communication
    nodes = planned(model, "32xh200", replicas=DataParallel(32, sharded=True)).step_seconds
    assert nodes.communication == pytest.approx(31 / 32 * size * 8 / (0.7 * 400e9))


def test_the_record_adds_up(build):
    record = planned(build("mhc")).record()
    memory = dict(record["memory_bytes_per_device"])
    assert memory.pop("total") == sum(memory.values())
    kinds = dict(record["activation_bytes_per_device"])
    assert kinds.pop("with_recompute") < kinds["without_recompute"]
    assert kinds.pop("without_recompute") == sum(kinds.values()) == memory["activations"]
    assert memory["rebuilt"] == 0 < record["recompute_block"]
    assert record["fits"] is True


def test_a_plan_with_recompute_has_the_memory_of_its_blocks(build):
    model = build("mhc", num_layers=6)
    off, on = planned(model), planned(model, recompute_block=4)
    assert on.recompute_block == 4 and off.recompute_block == 3
    assert on.activations_without_recompute == off.memory.activations > on.memory.activations
    assert sum(on.activations.values()) == on.memory.activations
    assert on.activations_with_recompute > on.memory.activations
    assert on.memory.total == off.memory.total - off.memory.activations + (
        on.memory.activations + on.memory.rebuilt
    )
    batch = on.run.micro_batch(on.machine)
    n, layers, blocks = 4, 12, 3
    vector = 32 * 2 * batch.tokens
    assert replayed_bytes(model, batch) == vector * (layers * (n + 3) + layers - blocks)
    assert on.step_seconds.compute == off.step_seconds.compute


def test_a_plan_fits_up_to_the_last_byte(build):
    plan = planned(build("mhc"))
    kind = plan.machine.kind
    exact = replace(plan.machine, kind=replace(kind, memory=plan.memory.total))
    less = replace(plan.machine, kind=replace(kind, memory=plan.memory.total - 1))
    assert replace(plan, machine=exact).fits
    assert not replace(plan, machine=less).fits
