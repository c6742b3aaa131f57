"""A memory of n-grams trains in two and four processes as it does in one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("memory_in_processes.py")
BOTH = ("engram", "over_encoding")


def train(folder: Path, processes: int, *legs: dict[str, Any]) -> dict[str, Any]:
    """Run legs in one launch of so many processes; what the first process saw of each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    devices = {"devices": processes} if processes > 1 else {"strategy": "single"}
    named = [{**devices, **leg} for leg in legs]
    done = subprocess.run(
        [
            sys.executable,
            *(launcher if processes > 1 else []),
            str(SCRIPT),
            json.dumps(named),
            str(folder),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return {
        leg["name"]: torch.load(folder / f"{leg['name']}.pt", weights_only=False) for leg in named
    }


def assert_same_training(ours: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """Losses and norms of every step, the first step's gradients, and the final parameters."""
    assert len(expected["rows"]) == 5 and expected["rows"][0]["train/grad_norm"] > 0.5
    assert len(ours["rows"]) == len(expected["rows"]), name
    for row, wanted in zip(ours["rows"], expected["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-6), name
    for part in ("gradients", "state"):
        assert sorted(ours[part]) == sorted(expected[part]), (name, part)
        for key, wanted in expected[part].items():
            difference = torch.linalg.vector_norm((ours[part][key] - wanted).double())
            assert difference <= 1e-6 * torch.linalg.vector_norm(wanted.double()), (name, part, key)
    assert list(ours["state"]) == list(expected["state"]), name


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    legs = [{"name": memory, "memory": memory} for memory in BOTH]
    return train(tmp_path_factory.mktemp("single"), 1, *legs)


def pipeline(schedule: str, **more: Any) -> dict[str, Any]:
    return {"strategy": "pipeline", "layout": {"schedule": schedule, **more}}


@pytest.mark.slow
def test_every_layout_of_two_processes_trains_as_one_process_does(
    single: dict[str, Any], tmp_path: Path
) -> None:
    """The tokens reach every stage, also when backward computes a block again; from meta too."""
    legs = [
        {"memory": "engram", **pipeline("1f1b"), "recompute": 3},
        {"memory": "engram", **pipeline("zbv"), "meta": True},
        {"memory": "engram", **pipeline("dualpipev", microbatches=4), "recompute": "auto"},
        {"memory": "over_encoding", **pipeline("1f1b"), "meta": True},
        {"memory": "over_encoding", **pipeline("zbv"), "recompute": "auto"},
        *({"memory": memory, "strategy": "ddp"} for memory in BOTH),
        *({"memory": memory, "strategy": "fsdp", "meta": memory == "engram"} for memory in BOTH),
    ]
    named = [
        {"name": f"{k} {leg['memory']} {leg['strategy']}", **leg} for k, leg in enumerate(legs)
    ]
    for leg, ours in zip(named, train(tmp_path, 2, *named).values(), strict=True):
        assert_same_training(ours, single[leg["memory"]], leg["name"])


@pytest.mark.slow
def test_every_layout_of_four_processes_trains_as_one_process_does(
    single: dict[str, Any], tmp_path: Path
) -> None:
    """Two pipelines of two stages, and four shares of the batch."""
    two_by_two = pipeline("1f1b", pipeline_size=2)
    legs = [
        {"memory": "engram", **two_by_two, "meta": True},
        {"memory": "over_encoding", **two_by_two},
        {"memory": "engram", "strategy": "fsdp", "recompute": 3},
        {"memory": "over_encoding", "strategy": "fsdp", "meta": True},
    ]
    named = [
        {"name": f"{k} {leg['memory']} {leg['strategy']}", **leg} for k, leg in enumerate(legs)
    ]
    for leg, ours in zip(named, train(tmp_path, 4, *named).values(), strict=True):
        assert_same_training(ours, single[leg["memory"]], leg["name"])
