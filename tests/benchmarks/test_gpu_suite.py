"""The GPU suite at toy size, and its tables from made-up files."""

import json
import os
import subprocess
import sys

import pytest

import gpu_report
import gpu_suite
from gpu_bench import Bench
from gpu_results import Results
from published import PUBLISHED


@pytest.fixture(scope="module")
def toy(repository, tmp_path_factory):
    """What a run of all parts at toy size printed and wrote."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "benchmarks/gpu_suite.py", "--toy", "--output", str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, folder


@pytest.mark.slow
def test_every_part_runs_and_nothing_is_timed(toy):
    output, folder = toy
    parts = ("correctness", "kernels", "connection", "training", "memory")
    records = [json.loads((folder / f"gpu_{part}_toy.json").read_text()) for part in parts]
    assert all(record["toy"] and record["rows"] for record in records)
    checks = records[0]["rows"]
    assert all(row["passed"] and row["same_bits"] for row in checks)
    assert {row["operation"] for row in checks} >= {"read", "seam", "single_pass", "sinkhorn"}
    for record in records[1:]:
        assert not any("error" in row for row in record["rows"]), record["rows"]
        timed = [row.get("seconds") or row.get("bytes_per_second") for row in record["rows"]]
        assert not any(timed)
    assert records[-1]["rows"][0]["predicted_bytes"] > 0
    assert " ms" not in output
    assert "not measured" in gpu_report.report(folder)  # a toy is nobody's result


def test_without_a_gpu_it_says_so(repository, tmp_path):
    command = [sys.executable, "benchmarks/gpu_suite.py", "--output", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.splitlines()[-1].startswith("error: torch finds no GPU here")


def test_parts_share_the_time_and_one_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--toy", "--minutes", "11", "--output", str(tmp_path)])
    seconds = {}

    def run(part, bench, results, args):
        seconds[part] = bench.seconds_left
        if part == "kernels":
            raise RuntimeError("a process died")
        return True

    monkeypatch.setattr(gpu_suite, "_run", run)
    assert gpu_suite.main() == 1
    assert list(seconds) == ["correctness", "kernels", "connection", "training", "memory"]
    # None of them used its share, so the later ones have more.
    assert list(seconds.values()) == pytest.approx([180, 247.5, 132, 495, 660], rel=0.05)


def test_results_are_written_row_by_row_and_resumed(tmp_path):
    bench = Bench(toy=True, seconds=300)
    results = Results("kernels", bench, tmp_path)
    results.add(operation="a", n=4, seconds=None)
    results.add(operation="b", n=4, error="out of memory")
    held = json.loads((tmp_path / "gpu_kernels_toy.json").read_text())
    assert [row["operation"] for row in held["rows"]] == ["a", "b"]
    assert set(held["environment"]) >= {"device", "torch", "triton", "commit"}
    again = Results("kernels", bench, tmp_path, resume=True)
    assert not again.wants(operation="a", n=4)
    assert again.wants(operation="b", n=4) and again.wants(operation="a", n=2)
    late = Results("kernels", Bench(toy=True, seconds=0), tmp_path)
    assert not late.wants(operation="a", n=4)
    assert json.loads(late.path.read_text())["stopped_early"]


def record(part, *rows):
    about = {"device": "Some GPU", "commit": "abc", "torch": "2", "triton": "3"}
    about |= {"cuda": "13", "driver": "580"}
    return {"benchmark": f"gpu_{part}", "toy": False, "environment": about, "rows": list(rows)}


def test_tables_and_pictures(tmp_path, monkeypatch):
    def merge(by, milliseconds, width=1280):
        return {
            "operation": "merge_forward",
            "implementation": by,
            "n": 4,
            "width": width,
            "bytes": 4_000_000_000,
            "seconds": {"median": milliseconds / 1e3},
        }

    kernels = record(
        "kernels",
        {"operation": "copy", "turn": "before", "bytes_per_second": 4e12},
        merge("triton", 1.25),
        merge("triton", 2.5, 2560),
        {**merge("liger", 1, 2560), "seconds": None, "error": "OutOfMemoryError: much"},
    )
    base = {"overrides": "", "kernels": "torch", "sequences": 2, "tokens": 1000, "sub_layers": 10}
    step = {"tokens_per_second": 1e4, "mfu": 0.42}
    training = record(
        "training",
        {**base, **step, "model": "baseline_3b", "seconds": {"median": 0.10}},
        {**base, **step, "model": "mhc_3b", "seconds": {"median": 0.104}},
    )
    for part in (kernels, training):
        (tmp_path / f"{part['benchmark']}_some_gpu.json").write_text(json.dumps(part))
    text = gpu_report.report(tmp_path)
    assert "| merge_forward | triton | 1.250 (80%) | 2.500 (40%) |" in text
    assert "| merge_forward | liger | not measured | failed: OutOfMemoryError |" in text
    assert "4.00 TB/s" in text
    assert "| mhc_3b |  | torch | 2 | 10,000 | 42.0% | +4.0% | 400.00 |" in text
    other = {**kernels, "environment": {**kernels["environment"], "device": "NVIDIA H200"}}
    (tmp_path / "gpu_kernels_nvidia_h200.json").write_text(json.dumps(other))
    monkeypatch.setattr(sys, "argv", ["", "--results", str(tmp_path)])
    gpu_report.main()
    for name in ("some_gpu", "nvidia_h200"):
        picture = tmp_path / f"gpu_roofline_{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_committed_tables_show_the_committed_results(repository):
    written = (repository / "benchmarks/results/gpu.md").read_text(encoding="utf-8")
    assert written == gpu_report.report() + "\n"


def test_without_results_nothing_is_claimed(tmp_path):
    text = gpu_report.report(tmp_path)
    ours, others = text.split("## Published by others")
    tables = [part.splitlines() for part in ours.split("\n\n") if part.startswith("| ")]
    assert len(tables) == 5
    for _, _, *lines in tables:
        assert [set(line.split("|")) for line in lines] == [{"", " not measured "}]
    assert all(p.who in others and p.where in others for p in PUBLISHED)
    unknown = [p for p in PUBLISHED if p.hardware == "not told"]
    assert unknown and all(p.share is None for p in unknown)
