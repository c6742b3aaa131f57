"""DDP and FSDP2 in two processes against one process, and float32 where it is promised."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("train_in_processes.py")


def train(
    folder: Path, strategy: str, precision: str = "32-true", init: str = "whole"
) -> dict[str, Any]:
    output = folder / f"{strategy}-{precision}-{init}.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [
        sys.executable,
        *([] if strategy == "single" else launcher),
        str(SCRIPT),
        strategy,
        precision,
        init,
        str(output),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(output.read_text())


def assert_near_chance(record: dict[str, Any]) -> None:
    """Random tokens of 40 kinds cannot be predicted better than ln 40, and small weights don't."""
    losses = [row["train/loss"] for row in record["rows"]]
    assert losses == pytest.approx(5 * [math.log(40)], abs=0.2)
    assert all(0 < row["train/grad_norm"] < 100 for row in record["rows"])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("single"), "single")


@pytest.mark.parametrize(
    ("strategy", "init"), [("ddp", "whole"), ("fsdp", "whole"), ("fsdp", "meta")]
)
def test_two_processes_equal_one(
    strategy: str, init: str, single: dict[str, Any], tmp_path: Path
) -> None:
    """Also with a network on meta, which is initialised shard by shard, and never anywhere whole.

    Except for a connection's parameters: they are made whole, one connection at a time.
    """
    double = train(tmp_path, strategy, init=init)
    assert double["sharded"] == (strategy == "fsdp")
    assert (double["largest_allocation"] <= double["largest_parameter"] / 2) == (init == "meta")
    assert len(double["rows"]) == len(single["rows"]) == 5
    for ours, expected in zip(double["rows"], single["rows"], strict=True):
        for tag, value in expected.items():
            assert ours[tag] == pytest.approx(value, rel=1e-5), tag
    assert double["bias_of_experts"] == pytest.approx(single["bias_of_experts"])
    assert double["parameters"] == pytest.approx(single["parameters"], rel=1e-4)


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("fsdp", "bf16-mixed"),
        pytest.param("fsdp", "bf16-true", marks=pytest.mark.slow),
        pytest.param("ddp", "bf16-mixed", marks=pytest.mark.slow),
        pytest.param("ddp", "bf16-true", marks=pytest.mark.slow),
        ("single", "bf16-mixed"),
        ("single", "bf16-true"),
    ],
)
def test_connections_stay_float32(strategy: str, precision: str, tmp_path: Path) -> None:
    record = train(tmp_path, strategy, precision)
    assert record["connection_parameters"] == ["torch.float32"]
    assert record["dtypes"]["phi"] == ["torch.float32"]
    assert record["dtypes"]["mappings"] == ["torch.float32"]
    assert record["dtypes"]["streams"] == ["torch.bfloat16"]
    assert_near_chance(record)
