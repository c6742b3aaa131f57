"""Machines: their names, and the memory that a process can get on this one."""

from dataclasses import replace

import pytest
import torch

from mhc_lightning.errors import UserError
from mhc_lightning.planning import Machine, machine_of, this_machine


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [("8xh200", "h200", 8), ("h100", "h100", 1), ("64xH100", "h100", 64), ("cpu", "cpu", 1)],
)
def test_a_machine_is_a_number_of_a_kind(text, name, devices):
    machine = machine_of(text)
    assert (machine.kind.name, machine.devices) == (name, devices)
    assert machine.name == f"{devices}x{name}"
    assert machine.kind.is_gpu == (name != "cpu")


@pytest.mark.parametrize("text", ["8xh201", "0xh100", "x", "", "8 h100", "-1xh100"])
def test_what_is_no_machine_is_refused_with_the_kinds_there_are(text):
    with pytest.raises(UserError, match="kinds: cpu, a100, h100, h200"):
        machine_of(text)


def test_this_machine_shares_its_free_memory_between_processes():
    alone = this_machine(1, torch.device("cpu")).kind.memory
    shared = this_machine(2, torch.device("cpu")).kind.memory
    assert alone > 2**20
    assert shared == pytest.approx(alone / 2, rel=0.5)


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"max": "5000\n", "current": "3000\n", "stat": "anon 1\ninactive_file 400\n"}, 2400),
        ({"max": "5000\n", "current": "5600\n", "stat": "anon 1\n"}, 0),
        ({"max": "max\n", "current": "3000\n", "stat": "inactive_file 400\n"}, None),
    ],
)
def test_a_containers_limit_counts(files, left, tmp_path, monkeypatch):
    free = machine_of("cpu").kind.memory
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr("mhc_lightning.planning.machine._CGROUP_ROOT", tmp_path)
    found = machine_of("cpu").kind.memory
    assert found == left if left is not None else found >= free * 0.5


def test_devices_of_a_processor_share_the_memory_of_their_host():
    gpu = machine_of("8xh100")
    room = gpu.kind.memory
    assert gpu.holds(room, 2 * 10**12)
    assert not gpu.holds(room + 1, 0) and not gpu.holds(0, 2 * 10**12 + 1)
    kind = replace(machine_of("cpu").kind, memory=250, host_memory=1000)
    four = Machine(kind, 4)
    assert four.holds(250, 0) and four.holds(150, 400)
    assert not four.holds(151, 400) and not four.holds(251, 0)


def test_nodes_are_full_but_for_the_last():
    assert [machine_of(f"{count}xh200").nodes for count in (1, 8, 9, 64)] == [1, 1, 2, 8]
