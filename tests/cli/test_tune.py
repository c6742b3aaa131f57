"""`tune` without a GPU: what it refuses, and that it measures what training runs."""

import ast
import functools
from pathlib import Path

import pytest
import torch

import mhc_lightning.kernels
from mhc_lightning.cli.main import main
from mhc_lightning.cli.tune import workloads_of
from mhc_lightning.kernels.triton_support.block_sizes import noted_lookups
from mhc_lightning.kernels.triton_support.launch import intercept
from mhc_lightning.kernels.triton_support.workloads import workloads
from mhc_lightning.modules import (
    Engram,
    HyperConnection,
    IdentityHyperConnection,
    ManifoldHyperConnection,
    Memory,
    SinglePassHyperConnection,
)
from mhc_lightning.modules.memory.engram import EngramBlock

KINDS = [
    HyperConnection,
    IdentityHyperConnection,
    ManifoldHyperConnection,
    SinglePassHyperConnection,
]
WIDTH, RECOMPUTED = 16, 2


def test_without_a_gpu_there_is_one_clear_line(capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune", "--config", "mhc_3b"]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: tune measures on a GPU") and "run it where you train" in line


def test_the_residual_connection_has_nothing_to_tune(capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert main(["tune", "--config", "baseline_3b"]) == 2
    assert "nothing to tune" in capfd.readouterr()[1].splitlines()[-1]


def launches(call):
    """By the table's entry that was looked up: the launches, with all that tells them apart."""
    found: dict[str, set[tuple[str, str, str]]] = {}

    def note(launch):
        constants = {k: v for k, v in launch.constants.items() if "block" not in k.lower()}
        given = [str(getattr(a, "dtype", a is None)) for a in launch.args]
        entry = (launch.kernel.__name__, str(constants), str(given))
        found.setdefault(lookups[-1].kernel, set()).add(entry)
        lookups.clear()  # a launch that looks nothing up shall fail

    # Nothing runs: what is launched does not depend on values.

    with noted_lookups() as lookups, intercept(note):
        call()
    return found


def engram_block(conv):
    sizes = {"vocab_size": 9, "model_dim": WIDTH, "num_layers": 2, "num_streams": 2}
    return memory(conv)(**sizes).block_memory(1)


def memory(conv):
    return functools.partial(Engram, rows=50, num_heads=2, layers=[1], conv=conv)


@pytest.mark.parametrize("streams", [2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_what_training_runs_is_what_is_tuned(kind, streams, tiny_transformer, monkeypatch):
    compare_with_training(kind, streams, Memory, tiny_transformer, monkeypatch)


@pytest.mark.parametrize("conv", [True, False])
def test_what_training_with_a_memory_runs_is_what_is_tuned(conv, tiny_transformer, monkeypatch):
    kind = ManifoldHyperConnection
    compare_with_training(kind, 2, memory(conv), tiny_transformer, monkeypatch)


def compare_with_training(kind, streams, memory, tiny_transformer, monkeypatch):
    monkeypatch.setenv("MHC_LIGHTNING_KERNELS", "triton")
    model = tiny_transformer(connection=kind, num_streams=streams, dim=WIDTH, memory=memory)
    model.set_recompute(RECOMPUTED)
    tokens = torch.arange(12).view(2, 6)
    trained = launches(lambda: model.loss(tokens, tokens).backward())
    connection = next(m for m in model.modules() if isinstance(m, kind))
    work = workloads(12, streams, WIDTH, torch.float32, sub_layers=RECOMPUTED)
    engram = next((m for m in model.modules() if isinstance(m, EngramBlock)), None)
    names = workloads_of(connection, RECOMPUTED, engram)
    beside = {"sinkhorn_forward", "sinkhorn_backward"} & set(names)
    assert set(trained) == set(names) - beside
    if kind is IdentityHyperConnection:
        return  # like all that mixes in torch, it runs what mHC runs, with fewer coefficients
    for name in trained:
        assert launches(work[name].run)[name] <= trained[name]


def test_every_kernel_there_is_can_be_tuned():
    """A new one needs a workload, an entry of its own, and a place in what `tune` measures."""
    folder = Path(mhc_lightning.kernels.__file__).parent
    kernels = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels.add(node.name)
    work = workloads(3, 2, WIDTH, torch.float32)
    run = {name: launches(workload.run) for name, workload in work.items()}
    assert {name: {name} for name in run} == {name: set(found) for name, found in run.items()}
    assert {entry[0] for name, found in run.items() for entry in found[name]} == kernels
    tuned = {
        name
        for kind in KINDS
        for streams in (2, 5)
        for engram in (None, *(engram_block(conv) for conv in (True, False)))
        for name in workloads_of(kind(WIDTH, streams, 0), RECOMPUTED, engram)
    }
    assert tuned == set(work)
