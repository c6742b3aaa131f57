"""Every kernel, compiled for GPUs that are not there, with its default block sizes."""

import json
import os
import subprocess
import sys

import pytest

from compiled_kernels import REGISTER_LIMIT, SHARED_LIMIT, TARGETS

PAPER_WIDTHS = ("2560", "7168")  # of 27B, and of DeepSeek-V3
NARROWEST = ("1280",)


@pytest.fixture(scope="module")
def compiled(repository):
    """Returns a function: what the kernels use, compiled in a process without the interpreter."""

    def run(*arguments: str) -> list[dict]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "benchmarks/compiled_kernels.py", "--json", *arguments]
        result = subprocess.run(
            command, cwd=repository, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
        rows = json.loads(result.stdout)
        assert len({row["workload"] for row in rows}) >= 18
        return rows

    return run


def problems(row: dict) -> list[str]:
    """What is wrong with a compiled kernel."""
    threads = row["num_warps"] * TARGETS[row["target"]].warp_size
    found = {
        "spills": row["spills"] > 0 or row["stack"] > 0,
        "registers": row["registers"] * threads > REGISTER_LIMIT[row["target"]],
        "shared memory": row["shared"] > SHARED_LIMIT[row["target"]],
        "atomics": row["atomics"] > 0,
    }
    return [name for name, is_wrong in found.items() if is_wrong]


def narrow(row: dict) -> list[str]:
    """Which accesses to streams of 16-bit numbers are narrower than 16 bytes."""
    widths = {
        kind: {int(width) for width in row[kind]} for kind in ("loads", "stores") if row[kind]
    }
    wrong = [f"{kind} of 2 bytes" for kind, found in widths.items() if min(found) < 4]
    # Registers hold a sum for every tap of every stream beside what is loaded, so few channels.
    few_channels = row["workload"] == "gated_write_backward_convolved"
    touches_streams = row["elements"] > 0 and not few_channels
    wrong += ["no loads of 16 bytes"] * (touches_streams and 16 not in widths["loads"])
    reading = ("project", "aggregate_backward_of_pre", "context_gate_forward")
    reads_only = row["workload"].startswith(reading)
    writes_streams = touches_streams and not reads_only
    return wrong + ["no stores of 16 bytes"] * (writes_streams and 16 not in widths["stores"])


def report(wrong: list[tuple[dict, list[str]]]) -> str:
    """One line for each kernel that something is wrong with."""
    shape = ("workload", "n", "width", "dtype", "target")
    lines = (
        f"{' '.join(str(row[key]) for key in shape)}: {', '.join(what)}"
        for row, what in wrong
        if what
    )
    return "\n".join(lines)


@pytest.mark.parametrize("widths", [NARROWEST, pytest.param(PAPER_WIDTHS, marks=pytest.mark.slow)])
def test_default_kernels_for_hopper_at_the_papers_widths(compiled, widths):
    rows = compiled("--widths", *widths)
    assert report([(row, problems(row) + narrow(row)) for row in rows]) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "streams"),
    [("sm_90", "158"), ("sm_80", "8"), ("sm_100", "8"), ("gfx942", "8")],
)
def test_default_kernels_for_any_number_of_streams(compiled, target, streams):
    rows = compiled("--targets", target, "--streams", *streams, "--widths", "2560")
    wide = ("--widths", "1000", "--dtypes", "float32")
    rows += compiled("--targets", target, "--streams", "4", *wide)
    # Seams are crossed by parts on AMD's chips (kernels/backend.py).
    fused = target != "gfx942"
    rows = [row for row in rows if fused or not row["workload"].startswith("merge_project")]
    assert report([(row, problems(row)) for row in rows]) == ""
