"""Tables in the memory of the machine: refused before they are made, and never moved."""

import copy
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import tiny_transformer

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Engram, NgramTable
from mhc_lightning.strategies import host_rows
from mhc_lightning.strategies.host_rows import HostRows, available_memory, put_on_host


def build(**settings: Any) -> Any:
    return tiny_transformer(memory=partial(Engram, rows=50, dim=8, layers=[1], **settings))


def tables(network: Any) -> list[NgramTable]:
    return [module for module in network.modules() if isinstance(module, NgramTable)]


def test_too_little_memory_is_said_before_any_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        network = build()
    monkeypatch.setattr(host_rows, "available_memory", lambda: 1000)
    monkeypatch.setattr(host_rows, "_new_memory", lambda *_: pytest.fail("memory was taken"))
    words = r"placement=host needs 0\.0 GB for .* the machine's memory has 0\.0 GB free; use fewer"
    with pytest.raises(UserError, match=words):
        put_on_host(tables(network), None)
    assert all(table.weight.is_meta for table in tables(network))


def test_shared_memory_that_is_too_small_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers often have 64 MB of it, whatever the machine has."""
    usage = type("usage", (), {"free": 64_000_000})
    monkeypatch.setattr(host_rows.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(host_rows, "available_memory", lambda: 10**12)
    assert host_rows._shortage(100_000_000, shared=True) == (64_000_000, "/dev/shm")
    assert host_rows._shortage(60_000_000, shared=True) is None
    assert host_rows._shortage(100_000_000, shared=False) is None


def test_the_machine_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_memory()
    assert free is not None and 10**6 < free < 10**15

    def missing(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert available_memory() is None and host_rows._shortage(10**18, shared=False) is None


def test_rows_from_meta_are_those_of_a_network_built_whole() -> None:
    whole = build()
    with torch.device("meta"):
        network = build()
    network.init_seed = whole.init_seed
    put_on_host(tables(network), None)
    for ours, expected in zip(tables(network), tables(whole), strict=True):
        assert torch.equal(ours.weight, expected.weight)


def test_rows_are_gathered_ahead_and_are_those_of_the_batch() -> None:
    """Once for a batch; again where the rows are others, and after an update."""
    network = build(zero_start=False).double()
    tokens = torch.randint(0, 40, (2, 7))
    expected = network(tokens)
    put_on_host(tables(network), None)
    (table,) = tables(network)
    gathered: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def gather(*args: Any, **more: Any) -> Any:
            gathered.append(threading.current_thread().name)
            return real(*args, **more)

        real = host_rows._gather
        patch.setattr(host_rows, "_gather", gather)
        assert torch.equal(network(tokens), expected)
        assert len(gathered) == 1 and gathered[0].startswith("rows")
        network.recall(tokens)  # a batch that is given up
        rows = torch.tensor([[3, 70, 140, 200]])
        assert table.store is not None
        assert torch.equal(table.store.look_up(rows), table.weight[rows])
        table.store.settle()
        assert sorted(name[:4] for name in gathered[1:]) == ["Main", "rows"]
        with torch.no_grad():
            table.weight.mul_(2)
        assert not torch.equal(network(tokens), expected)


def host_table(deterministic: bool = True) -> tuple[NgramTable, HostRows]:
    network = build(zero_start=False)
    put_on_host(tables(network), None, deterministic)
    (table,) = tables(network)
    assert isinstance(table.store, HostRows)
    return table, table.store


@pytest.mark.parametrize("deterministic", [True, False])
def test_rows_of_the_next_micro_batch_are_gathered_behind_the_update_or_before_it(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    table, store = host_table(deterministic)
    rows, real, gathered = torch.tensor([[3, 70], [140, 3]]), host_rows._gather, []
    before = table.weight.detach()[rows].clone()
    monkeypatch.setattr(host_rows, "_gather", lambda *a, **k: gathered.append(1) or real(*a, **k))

    def update() -> None:
        with torch.no_grad():
            table.weight.add_(1)

    store.prefetch(rows.clone(), before_update=True)
    store.apply(update)
    store.fetch_ahead(rows)
    found = store.look_up(rows)
    assert torch.equal(found, before + 1 if deterministic else before)
    assert len(gathered) == 1
    store.settle()
    store.fetch_ahead(rows)  # what was gathered before serves once
    assert torch.equal(store.look_up(rows), before + 1) and len(gathered) == 2


def test_rows_gathered_for_another_micro_batch_are_not_taken() -> None:
    table, store = host_table()
    store.prefetch(torch.tensor([[1, 2]]), before_update=False)
    rows = torch.tensor([[1, 3]])
    store.fetch_ahead(rows)
    assert torch.equal(store.look_up(rows), table.weight.detach()[rows])


def test_an_update_runs_elsewhere_and_what_reads_rows_waits_for_it() -> None:
    table, store = host_table()
    may_go_on, threads = threading.Event(), []

    def update() -> None:
        may_go_on.wait(20)
        threads.append(threading.current_thread().name)
        with torch.no_grad():
            table.weight.zero_()

    store.apply(update)
    assert not threads  # this thread goes on
    threading.Timer(0.05, may_go_on.set).start()
    assert not table.state_dict()["weight"].any()
    assert threads[0].startswith("rows")


def test_an_update_that_fails_fails_the_run() -> None:
    _, store = host_table()

    def update() -> None:
        raise RuntimeError("no such row")

    store.apply(update)
    with pytest.raises(RuntimeError, match="no such row"):
        store.finish()


def test_a_table_stays_where_it_is_and_a_copy_is_an_ordinary_one() -> None:
    network = build()
    put_on_host(tables(network), None)
    (table,) = tables(network)
    assert isinstance(table.store, HostRows)
    network.to("meta")
    assert table.weight.device.type == "cpu" and network.output.weight.is_meta
    copied = copy.deepcopy(table)
    assert copied.store is None and copied.to("meta").weight.is_meta
