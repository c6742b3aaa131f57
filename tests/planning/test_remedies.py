"""Settings that make a run fit."""

from dataclasses import replace
from functools import partial

import pytest

from mhc_lightning.modules import Engram
from mhc_lightning.planning import (
    DataParallel,
    PlannedRun,
    RowTraining,
    machine_of,
    make_plan,
    precision_of,
    remedies,
)


@pytest.fixture
def run():
    return PlannedRun(
        batch_size=32,
        micro_batch_size=8,
        sequence_length=512,
        max_steps=10,
        precision=precision_of("32-true"),
        replicas=DataParallel(),
        state_per_value=lambda model, parameter: 2,
    )


def with_memory(size):
    machine = machine_of("h100")
    return replace(machine, kind=replace(machine.kind, memory=size))


def applied(run, remedy):
    """The run with a remedy's overrides."""
    for word in remedy.split():
        key, _, value = word.partition("=")
        if key == "data.micro_batch_size":
            run = replace(run, micro_batch_size=int(value))
        elif key == "data.sequence_length":
            run = replace(run, sequence_length=int(value))
        elif key == "trainer.precision":
            run = replace(run, precision=precision_of(value))
        elif key == "trainer.devices":
            run = replace(run, replicas=DataParallel(int(value), sharded=True))
        else:
            assert word == "strategy=fsdp"
    return run


def test_each_remedy_makes_the_run_fit_and_is_the_smallest_change(run, build):
    model = build("mhc")
    needed = make_plan(model, run, machine_of("h100")).memory.total
    machine = with_memory(int(needed * 0.6))
    assert not make_plan(model, run, machine).fits
    found = remedies(model, run, machine)
    assert {"data.micro_batch_size=4", "data.sequence_length=256"} <= set(found)
    for remedy in found:
        assert make_plan(model, applied(run, remedy), machine).fits, remedy
    assert not make_plan(model, replace(run, micro_batch_size=8), machine).fits


def test_a_model_larger_than_a_device_is_to_be_sharded(run, build):
    model = build("mhc", vocab_size=2000, dim=256, num_layers=4, ffn_dim=1024)
    run = replace(run, micro_batch_size=1, sequence_length=128)
    memory = make_plan(model, run, machine_of("h100")).memory
    machine = with_memory(memory.weights + memory.gradients + memory.optimizer)
    (sharding,) = [r for r in remedies(model, run, machine) if r.startswith("strategy=fsdp")]
    assert make_plan(model, applied(run, sharding), machine).fits


def test_devices_among_which_the_batch_does_not_divide_are_not_proposed(run, build):
    model = build("mhc", vocab_size=2000, dim=256, num_layers=4, ffn_dim=1024)
    run = replace(run, batch_size=16, micro_batch_size=1, sequence_length=32)
    eight = replace(run, replicas=DataParallel(8, sharded=True))
    machine = with_memory(make_plan(model, eight, machine_of("h100")).memory.total)

    def sharding(batch_size):
        texts = remedies(model, replace(run, batch_size=batch_size), machine)
        return [text for text in texts if text.startswith("strategy=fsdp")]

    assert sharding(16) == ["strategy=fsdp trainer.devices=8"]
    assert sharding(12) == []


def test_several_nodes_are_spelled_out_and_the_hopeless_is_said_to_be(run, build):
    model = build("mhc", vocab_size=2000, dim=256, num_layers=40, ffn_dim=1024)
    run = replace(run, batch_size=1024, micro_batch_size=1, sequence_length=32)
    total = make_plan(model, run, machine_of("h100")).memory.total
    for share in range(5, 100):  # less and less memory, until more than a node is needed
        found = remedies(model, run, with_memory(total // share))
        if any("trainer.num_nodes=" in remedy for remedy in found):
            break
    else:
        pytest.fail("no memory was small enough for several nodes")
    assert remedies(model, run, with_memory(1000)) == []


def test_tables_go_where_there_is_room(run, build):
    memory = partial(Engram, rows=10_000, layers=[0], num_heads=2, dim=512)
    model = build("mhc", memory=memory)

    def found(run, share):
        needed = make_plan(model, run, machine_of("h100")).memory.total
        machine = with_memory(int(needed * share))
        return remedies(model, run, machine), machine

    words, machine = found(run, 0.4)
    assert "memory.placement=host" in words and "memory.placement=sharded" not in words
    assert make_plan(model, replace(run, rows=RowTraining("host")), machine).fits
    four = replace(run, replicas=DataParallel(4))
    words, machine = found(four, 0.5)
    assert "memory.placement=sharded" in words
    assert make_plan(model, replace(four, rows=RowTraining("sharded")), machine).fits
    # The host has not enough either: only shares help.
    kind = replace(machine_of("h100").kind, host_memory=2**20)
    small = replace(machine_of("4xh100"), kind=kind)
    hosted = replace(four, rows=RowTraining("host"))
    plan = make_plan(model, hosted, small)
    assert plan.machine.holds(plan.memory.total, 0) and not plan.fits
    assert plan.host_memory > 2**20
    assert "memory.placement=sharded" in remedies(model, hosted, small)
