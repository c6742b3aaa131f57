"""Experts spread over devices: what each holds, sends and waits for, against plain counting."""

from dataclasses import replace
from itertools import combinations

import pytest

from mhc_lightning.errors import UserError
from mhc_lightning.planning import (
    DataParallel,
    ExpertParallel,
    Machine,
    PlannedRun,
    machine_of,
    make_plan,
    precision_of,
)
from mhc_lightning.planning.activations import MicroBatch
from mhc_lightning.planning.expert_parallel import (
    LinkBytes,
    all_to_all_seconds,
    exchange,
    routed_flops,
    routed_values,
    sent_bytes,
    values_on_device,
)
from mhc_lightning.planning.roofline import ring_seconds
from mhc_lightning.planning.tables import dense_values
from mhc_lightning.strategies.layout import ranks_of

SIZES = {"num_experts": 8, "num_active_experts": 2, "num_shared_experts": 1, "num_layers": 3}


def planned(model, machine, experts, **changes):
    settings = {
        "batch_size": 64,
        "micro_batch_size": 2,
        "sequence_length": 128,
        "max_steps": 10,
        "precision": precision_of("bf16-mixed"),
        "replicas": DataParallel(machine_of(machine).devices, sharded=True, experts=experts),
        "state_per_value": lambda model, parameter: 2,
    }
    return make_plan(model, PlannedRun(**{**settings, **changes}), machine_of(machine))


def counted_copies(size, per_node, experts, active, limit):
    """Mean vectors a token sends within and between nodes, by going through all choices.

    Only choices of experts that lie on at most `limit` nodes count, if there is a limit.
    """
    node_of = [e * size // experts // per_node for e in range(experts)]
    device_of = [e * size // experts for e in range(experts)]
    inside = outside = choices = 0
    for home in range(size):
        for chosen in combinations(range(experts), active):
            nodes = {node_of[e] for e in chosen}
            if limit is not None and len(nodes) != limit:
                continue
            choices += 1
            away = home // per_node
            if limit is None:
                inside += sum(node_of[e] == away and device_of[e] != home for e in chosen)
                outside += sum(node_of[e] != away for e in chosen)
            else:
                outside += len(nodes - {away})
                # A copy arrives at the device of the same place in the node.
                inside += sum(device_of[e] % per_node != home % per_node for e in chosen)
    return inside / choices, outside / choices


@pytest.mark.parametrize(
    ("size", "per_node", "active", "limit"),
    [
        (4, 4, 2, None),
        (4, 8, 3, None),
        (4, 2, 3, None),
        (8, 2, 2, None),
        (8, 2, 3, 2),
        (4, 2, 2, 1),
    ],
)
def test_a_device_sends_what_all_choices_of_experts_send_on_average(size, per_node, active, limit):
    kind = replace(machine_of("h200").kind, per_node=per_node)
    experts = ExpertParallel(size, nodes_per_token=limit)
    sent = sent_bytes(1000.0, active, experts, Machine(kind, size))
    inside, outside = counted_copies(size, per_node, 8, active, limit)
    assert sent == pytest.approx((1000 * inside, 1000 * outside))


def test_an_all_to_all_takes_what_its_slower_link_takes():
    machine = machine_of("64xh200")
    even = ExpertParallel(16, imbalance=1.0)
    within = all_to_all_seconds(LinkBytes(7e9, 0.0), ExpertParallel(8, 1.0), machine)
    assert within == pytest.approx(7e9 / (0.7 * 450e9), rel=1e-3)
    between = all_to_all_seconds(LinkBytes(7e9, 8e9), even, machine)
    assert between == pytest.approx(8e9 / (0.7 * 50e9), rel=1e-3) and between > 5 * within
    # Small messages cost their number, whatever their size.
    small = all_to_all_seconds(LinkBytes(7.0, 8.0), even, machine)
    assert small == pytest.approx(8 * machine.kind.network_latency, rel=1e-3)
    limited = replace(even, nodes_per_token=2)
    assert all_to_all_seconds(LinkBytes(7.0, 8.0), limited, machine) < small
    busy = all_to_all_seconds(LinkBytes(7e9, 8e9), replace(even, imbalance=1.5), machine)
    assert busy == pytest.approx(1.5 * between, rel=1e-3)


def test_without_nvlink_a_node_is_as_slow_as_pcie():
    sent, experts = LinkBytes(7e9, 0.0), ExpertParallel(8, 1.0)
    over = {name: all_to_all_seconds(sent, experts, machine_of(name)) for name in ("l40s", "h200")}
    assert over["l40s"] / over["h200"] == pytest.approx(450 / 32, rel=1e-2)


def test_the_bytes_of_a_pass_are_those_of_its_layers(build):
    model = build("mhc", **SIZES)
    batch = MicroBatch(2, 128, precision_of("bf16-mixed"), fused_norm=True)
    replicas = DataParallel(8, sharded=True, experts=ExpertParallel(4))
    found = exchange(model, batch, replicas, machine_of("8xh200"))
    # Two layers of experts, each with a dispatch and a combine; 3 of 4 copies leave the device.
    assert found.layers == 2
    assert found.bytes == (2 * 2 * 256 * 2 * 32 * 2 * 3 / 4, 0)
    assert found.dispatch == found.combine > 0
    eight_bits = replace(replicas, experts=replace(replicas.experts, dispatch_bytes=1))
    assert exchange(model, batch, eight_bits, machine_of("8xh200")).bytes.node == pytest.approx(
        found.bytes.node * 3 / 4
    )
    assert exchange(model, batch, DataParallel(8), machine_of("8xh200")).seconds == 0


def test_state_is_shared_by_all_and_a_device_gathers_its_own_experts_only(build):
    model = build("mhc", **SIZES)
    whole = planned(model, "8xh200", ExpertParallel(1))
    spread = planned(model, "8xh200", ExpertParallel(4, imbalance=1.0))
    for kind in ("weights", "gradients", "optimizer", "activations"):
        assert getattr(spread.memory, kind) == getattr(whole.memory, kind), kind
    block = model.blocks[1]
    away = 3 / 4 * routed_values(block)
    assert dense_values(block) - values_on_device(block, ExpertParallel(4)) == away
    # Blocks are held four times in two bytes and once in four; rows are sent and received.
    dense = max(dense_values(model.blocks[0]), values_on_device(block, ExpertParallel(4)))
    rows = 2 * 2 * 256 * 32 * 2
    saved = whole.memory.communication - spread.memory.communication
    assert saved == (dense_values(block) - dense) * (4 * 2 + 4) - rows


def test_only_devices_with_the_same_experts_gather_them(build):
    model = build("mhc", **SIZES)
    machine = machine_of("32xh200")
    step = planned(model, "32xh200", ExpertParallel(8, imbalance=1.0)).step_seconds
    moved = 1 * (2 + 2 + 4)
    others = (dense_values(model) - routed_values(model)) * moved
    # Experts of a device are on one device of each node: 4 devices over one adapter.
    own = routed_values(model) / 8 * moved * 3 / 4 / (0.7 * 50e9)
    assert step.communication == pytest.approx(31 / 32 * others / (0.7 * 400e9) + own)
    assert ring_seconds(1e9, 2, 2, machine) == pytest.approx(5e8 / (0.7 * 450e9))
    assert ring_seconds(1e9, 4, 2, machine) == pytest.approx(7.5e8 / (0.7 * 100e9))
    assert step.exchange > 0
    assert step.total == pytest.approx(
        max(step.compute + step.traffic, step.communication) + step.exchange
    )


def test_the_busiest_device_has_more_of_everything_that_is_routed(build):
    model = build("mhc", **SIZES)
    even = planned(model, "8xh200", ExpertParallel(4, imbalance=1.0))
    busy = planned(model, "8xh200", ExpertParallel(4, imbalance=1.5))
    tokens = 64 * 128 / 8
    more = 0.5 * routed_flops(model) * tokens / (0.6 * 989e12)
    assert busy.step_seconds.compute - even.step_seconds.compute == pytest.approx(more)
    assert busy.step_seconds.exchange > even.step_seconds.exchange
    # Two of three experts that a token passes are routed.
    kept = even.activations["experts"]
    assert busy.activations["experts"] == int(kept * (1 + 0.5 * 2 / 3))
    assert sum(busy.activations.values()) == busy.memory.activations
    # Whatever the routing, nothing is busier where every device has all experts.
    alone = planned(model, "8xh200", ExpertParallel(1, imbalance=3.0))
    assert alone.step_seconds == planned(model, "8xh200", ExpertParallel(1)).step_seconds


@pytest.mark.parametrize(("size", "fitting"), [(3, "1, 2, 4"), (8, "1, 2, 4"), (12, "1, 2, 4")])
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(build, size, fitting):
    model = build("residual", **SIZES)
    with pytest.raises(UserError, match=f"use one of {fitting}$"):
        ExpertParallel(size).check(model, 12)


def test_a_dense_model_has_no_experts_to_spread(build):
    ExpertParallel(1).check(build("residual"), 8)
    with pytest.raises(UserError, match="has no experts to spread; use 1"):
        ExpertParallel(2).check(build("residual"), 8)


def test_ranks_in_a_node():
    """Devices that share experts follow each other, then the devices of their pipelines."""
    for devices, stages, spread, inside in (
        (8, 8, 1, 1), (16, 4, 1, 2), (16, 4, 2, 2), (16, 2, 2, 4), (8, 4, 8, 8), (64, 1, 8, 8),
        (16, 4, 16, 8),
    ):  # fmt: skip
        replicas = DataParallel(devices, True, pipeline_size=stages, experts=ExpertParallel(spread))
        ranks = ranks_of(devices, stages, spread)
        assert sorted(ranks.flatten().tolist()) == list(range(devices * stages))
        assert int((ranks[:, 0] < 8).sum()) == replicas.in_node(8) == inside
        # Those that share experts are in one node, or fill whole nodes.
        for shared in ranks.unflatten(0, (-1, spread)).transpose(1, 2).flatten(0, 1).tolist():
            assert len({rank // 8 for rank in shared}) == max(1, spread // 8)
