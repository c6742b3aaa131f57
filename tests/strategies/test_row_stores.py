"""Tables that every process has a copy of: trained, saved and resumed as by one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("copied_rows_in_processes.py")
ALL = [
    {"memory": memory, "recipe": recipe, "update": update}
    for memory, recipe, update in (
        ("engram", "adamw", "adam"),
        ("over_encoding", "adamw", "rowwise"),
        ("engram", "muon", "rowwise"),
        ("over_encoding", "muon", "adam"),
    )
]


def train(folder: Path, processes: int, *legs: dict[str, Any]) -> list[dict[str, Any]]:
    """Run legs in one launch of so many processes; what the first process saw of each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    layout = {"devices": processes, "strategy": "ddp" if processes > 1 else "single"}
    named = [{"name": f"{processes}-{k}", **layout, **leg} for k, leg in enumerate(legs)]
    start = launcher if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *start, str(SCRIPT), json.dumps(named), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"{leg['name']}.pt", weights_only=False) for leg in named]


def assert_same(ours: dict[str, Any], expected: dict[str, Any], *, exact: bool = False) -> None:
    """Losses and norms of all steps that `ours` has done, and the final parameters."""
    bound = 0.0 if exact else 1e-6
    rows = expected["rows"][-len(ours["rows"]) :]
    assert len(ours["rows"]) == len(rows) > 0
    for row, wanted in zip(ours["rows"], rows, strict=True):
        assert row == pytest.approx(wanted, rel=bound, abs=0)
    assert ours["state"].keys() == expected["state"].keys()
    for name, wanted in expected["state"].items():
        torch.testing.assert_close(ours["state"][name], wanted, rtol=0, atol=bound)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("single"), 1, *ALL)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "lightning_ddp"])
def test_two_processes_train_as_one_does(single, tmp_path, strategy):
    """Five steps of two batches each, clipped; the script compares the copies."""
    both = train(tmp_path, 2, *({**leg, "strategy": strategy} for leg in ALL))
    for ours, expected in zip(both, single, strict=True):
        assert expected["rows"][0]["train/grad_norm"] > 0.5
        assert_same(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_resumes_exactly_and_on_another_number_of_processes(
    single, tmp_path, sharded, processes
):
    some = (0, 2)
    saved = [{**ALL[k], "folder": str(k), "steps": 2, "save": {"sharded": sharded}} for k in some]
    train(tmp_path, processes, *saved)
    (found,) = (tmp_path / "0").rglob("step_00000002*")
    again = [
        {**leg, "steps": 5, "start": 2, "resume": found.relative_to(tmp_path / "0").as_posix()}
        for leg in saved
    ]
    for leg in again:
        leg["save"] = {"sharded": sharded, "every_n_steps": 1000}
    whole = [single[k] for k in some]
    if processes == 2:
        whole = train(tmp_path, 2, *(ALL[k] for k in some))
    for number in (processes, 3 - processes):
        for ours, expected in zip(train(tmp_path, number, *again), whole, strict=True):
            assert_same(ours, expected, exact=number == processes)
