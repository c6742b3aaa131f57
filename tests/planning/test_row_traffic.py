"""The bytes that rows of a memory move, and the seconds of a step that they take."""

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
)
from mhc_lightning.planning.roofline import StepTime
from mhc_lightning.planning.row_traffic import row_traffic

MEMORY = partial(Engram, rows=1000, layers=[0, 1], num_heads=2, dim=16)
ROW, PAIR = 4 * 8, 4 * 8 + 8  # a row, and a gradient with its number
LOOK_UPS = 2 * 4  # of a token: four heads in two tables


def moved(build, replicas, machine="8xh200", precision="bf16-mixed"):
    model = build("mhc", memory=MEMORY)
    return row_traffic(model, precision_of(precision), replicas, machine_of(machine))


def placed(devices, placement, sharded=False):
    return DataParallel(devices, sharded, rows=RowTraining(placement))


def test_rows_of_one_device_go_nowhere(build):
    for placement in ("device", "sharded"):
        found = moved(build, placed(1, placement))
        assert (found.network, found.pcie) == (0, 0)
        assert found.device > 0


def test_shares_are_asked_for_rows_and_sent_gradients(build):
    found = moved(build, placed(4, "sharded"))
    assert found.network == pytest.approx(3 / 4 * LOOK_UPS * (8 + ROW + PAIR))
    assert found.pcie == 0
    assert moved(build, placed(4, "device", sharded=True)) == found


def test_copies_get_the_gradients_of_all_others(build):
    assert moved(build, placed(4, "device")).network == 3 * LOOK_UPS * PAIR
    wide = moved(build, placed(4, "device"), precision="64-true")
    assert wide.network == 3 * LOOK_UPS * (8 + 2 * ROW)


def test_rows_of_the_host_come_and_go_over_pcie(build):
    one = moved(build, placed(8, "host"))
    assert one.pcie == LOOK_UPS * (8 + ROW + PAIR)
    assert one.network == 0
    four = moved(build, placed(32, "host"), machine="32xh200")
    assert four.pcie == one.pcie
    assert four.network == 3 * LOOK_UPS * PAIR  # to the tables of other machines


def test_seconds_are_those_of_the_links(build):
    machine = machine_of("8xh200")
    found = moved(build, placed(8, "host"))._replace(network=100.0)
    seconds = found.seconds(1000, 450e9, machine)
    assert seconds == pytest.approx(1000 * (100 / 450e9 + found.pcie / 64e9) / 0.7)


def test_rows_cost_a_step_what_they_take_unless_they_are_hidden():
    work = StepTime(2.0, 1.0, 0.5, rows=0.25)
    assert work.total == 3.25
    assert replace(work, rows_hidden=True).total == 3
    assert replace(work, rows=4.0, rows_hidden=True, waiting=1.0).total == 5


def test_a_step_does_not_depend_on_the_rows_of_a_table(build):
    def planned(rows, placement):
        model = build("mhc", memory=partial(MEMORY, rows=rows))
        run = PlannedRun(
            batch_size=8,
            micro_batch_size=1,
            sequence_length=64,
            max_steps=10,
            precision=precision_of("bf16-mixed"),
            replicas=DataParallel(4),
            state_per_value=lambda model, parameter: 2,
            rows=RowTraining(placement),
        )
        return make_plan(model, run, machine_of("4xh200"))

    for placement in ("device", "sharded", "host"):
        small, large = planned(1000, placement), planned(1_000_000, placement)
        assert small.step_seconds == large.step_seconds
        assert small.step_seconds.rows > 0
        assert small.step_seconds.rows_hidden is (placement == "host")
        assert large.placements[placement].memory == large.memory
        assert large.placements[placement].step_seconds == large.step_seconds
    assert set(large.placements) == {"device", "sharded", "host"}
    record = large.record()["memory_rows"]
    assert record["placement"] == "host"
    host = record["placements"]["host"]
    assert host["step_seconds"]["hidden"] < host["step_seconds"]["not_hidden"]
    assert host["pcie_bytes_per_token"] == LOOK_UPS * (8 + ROW + PAIR)
