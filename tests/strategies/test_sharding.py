"""DDP and FSDP2 in two processes against one process, and float32 where it is promised."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import train_in_processes

from mhc_lightning.modules import initialisation

SCRIPT = Path(train_in_processes.__file__)
Case = tuple[str, str, str]

WHOLE: list[Case] = [
    ("ddp", "32-true", "whole"),
    ("fsdp", "32-true", "whole"),
    ("fsdp", "32-true", "meta"),
]
HALF: list[Case] = [
    (strategy, precision, "whole")
    for strategy in ("ddp", "fsdp")
    for precision in ("bf16-mixed", "bf16-true")
]


def in_this_process(*case: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialisation, "_GROUP", initialisation._GROUP)  # the run changes it
        return train_in_processes.train(*case)


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return in_this_process("single")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    """What the first of two processes recorded, by case; one group of processes runs them all."""
    output, cases = tmp_path_factory.mktemp("two") / "records.json", [*WHOLE, *HALF]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), json.dumps(cases), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip(cases, json.loads(output.read_text()), strict=True))


def assert_near_chance(record: dict[str, Any]) -> None:
    """Random tokens of 40 kinds cannot be predicted better than ln 40, and small weights don't."""
    losses = [row["train/loss"] for row in record["rows"]]
    assert losses == pytest.approx(5 * [math.log(40)], abs=0.2)
    assert all(0 < row["train/grad_norm"] < 100 for row in record["rows"])


def assert_float32_connections(record: dict[str, Any]) -> None:
    assert record["connection_parameters"] == ["torch.float32"]
    assert record["dtypes"] == {
        "phi": ["torch.float32"],
        "mappings": ["torch.float32"],
        "streams": ["torch.bfloat16"],
    }
    assert_near_chance(record)


@pytest.mark.parametrize("case", WHOLE, ids=" ".join)
def test_two_processes_equal_one(
    case: Case, single: dict[str, Any], records: dict[Case, dict[str, Any]]
) -> None:
    """Also with a network on meta, which is initialised shard by shard, and never anywhere whole.

    Except for a connection's parameters: they are made whole, one connection at a time.
    """
    double = records[case]
    assert double["sharded"] == (case[0] == "fsdp")
    assert (double["largest_allocation"] <= double["largest_parameter"] / 2) == (case[2] == "meta")
    assert len(double["rows"]) == len(single["rows"]) == 5
    for ours, expected in zip(double["rows"], single["rows"], strict=True):
        for tag, value in expected.items():
            assert ours[tag] == pytest.approx(value, rel=1e-5), tag
    assert double["bias_of_experts"] == pytest.approx(single["bias_of_experts"])
    assert double["parameters"] == pytest.approx(single["parameters"], rel=1e-4)


@pytest.mark.parametrize("case", HALF, ids=" ".join)
def test_connections_stay_float32_on_two_processes(
    case: Case, records: dict[Case, dict[str, Any]]
) -> None:
    assert_float32_connections(records[case])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_connections_stay_float32_on_one_process(precision: str) -> None:
    assert_float32_connections(in_this_process("single", precision))
