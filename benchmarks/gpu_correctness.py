"""Part `correctness`: whether the kernels compute the right thing on this GPU.

The matrix of `gpu_cases.py` in several processes (most of the time goes into compiling), then
compiled against eager, streams of more than 2³¹ elements, and NVIDIA's compute-sanitizer if it is
there. Run by itself, this file does a few cases and nothing else, for the sanitizer to watch.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_bench import Bench, attempt, release_memory
from gpu_cases import LIMITS, Case, check_case, matrix, operands, toy_matrix
from gpu_results import Results
from mhc_lightning.kernels import (
    aggregate_streams,
    expand_streams,
    mean_streams,
    merge_and_read,
    merge_streams,
    read_hyper_streams,
    read_streams,
)
from timing import kernels

_WATCHED = (Case(4, 256, 37, "bfloat16"), Case(3, 257, 5, "float32", "transposed"))


def check(bench: Bench, results: Results, jobs: int) -> bool:
    """Run all checks; whether every one passed.

    Args:
        bench: The device.
        results: Where the rows go.
        jobs: Processes for the matrix.
    """
    if bench.toy:
        _check_matrix(bench, results, list(toy_matrix()), jobs)
    else:
        cases = list(matrix())
        _check_matrix(bench, results, [case for case in cases if case.n == 4], jobs)
        for name, function in (("mhc", read_streams), ("hc", read_hyper_streams)):
            if results.wants(check="compiled", operation=name):
                found = attempt(partial(_compiled_against_eager, function, bench.device))
                results.add(check="compiled", operation=name, **{"passed": False, **found})
        if results.wants(check="offsets"):
            results.add(check="offsets", **{"passed": False, **attempt(_beyond_32_bits)})
            release_memory()
        _check_matrix(bench, results, [case for case in cases if case.n != 4], jobs)
        for tool in ("memcheck", "racecheck"):
            if results.wants(check="sanitizer", operation=tool):
                found = _sanitizer(tool, min(200.0, bench.seconds_left))
                results.add(check="sanitizer", operation=tool, **found)
    return all(row["passed"] for row in results.rows if row["passed"] is not None)


def _check_matrix(bench: Bench, results: Results, cases: list[Case], jobs: int) -> None:
    """Check cases, in several processes on a GPU; those that share kernels in the same one."""
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        if results.wants(check="matrix", **case._asdict()):
            groups.setdefault((case.n, case.width, case.dtype), []).append(case)
    if bench.toy:
        for group in groups.values():
            for row in _check_group(group, bench.device):
                results.add(check="matrix", **row)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(_check_group, group, bench.device) for group in groups.values()]
        for future in as_completed(futures):
            if future.cancelled():
                continue
            try:
                rows = future.result()
            except BrokenExecutor as error:  # a process died, and all that waited with it
                results.add(check="matrix", passed=False, error=str(error))
                break
            for row in rows:
                results.add(check="matrix", **row)
            if bench.out_of_time and any([waiting.cancel() for waiting in futures]):
                results.stopped_early()


def _check_group(cases: list[Case], device: str) -> list[dict[str, Any]]:
    return [row for case in cases for row in check_case(case, device)]


def _two_sub_layers(read: Callable, n: int, x: Tensor, output: Tensor, *parameters: Any) -> Tensor:
    streams, u, mappings = read(expand_streams(x, n), *parameters)
    if read is read_streams:
        streams, u, mappings = merge_and_read(
            streams, u.tanh(), mappings.residual, mappings.post, *parameters
        )
    return mean_streams(merge_streams(streams, u * output, mappings.residual, mappings.post))


def _compiled_against_eager(read: Callable, device: str) -> dict[str, Any]:
    """Gradients of ordinary and of large size, with and without torch.compile."""
    errors = []
    for dtype, size in (("float32", 1.0), ("float32", 1e4), ("bfloat16", 1.0), ("bfloat16", 1e4)):
        o = operands(Case(4, 512, 300, dtype), device)
        end = "" if read is read_streams else "_1"
        given = [o["y"], o["y"].flip(0) * 0.1, *(o[k + end] for k in ("phi", "alpha", "bias"))]
        step = partial(_two_sub_layers, read, 4)
        runs = []
        with kernels("triton"):
            for function in (step, torch.compile(step, fullgraph=True)):
                leaves = [t.detach().clone().requires_grad_() for t in given]
                value = function(*leaves)
                upstream = torch.full_like(value, size)
                runs.append((value.detach(), *torch.autograd.grad(value, leaves, upstream)))
        limit = LIMITS[getattr(torch, dtype)]
        for eager, compiled in zip(*runs, strict=True):
            largest = eager.abs().max().double()
            errors.append(float((eager.double() - compiled.double()).abs().max() / largest) / limit)
    worst = max(errors) if all(e == e for e in errors) else float("inf")
    return {"passed": worst <= 1, "error_over_limit": worst}


def _beyond_32_bits() -> dict[str, Any]:
    """The last tokens of 2³¹ elements and more, against the same tokens by themselves."""
    n, width, last = 4, 7168, 50
    tokens = 2**31 // (n * width) + last
    pre, post, residual = (
        torch.rand(tokens, *shape, device="cuda") for shape in ((n,), (n,), (n, n))
    )
    x = torch.randn(tokens, n, width, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    o = operands(Case(n, width, 1, "bfloat16"), "cuda")
    parameters = (o["phi"], o["alpha"], o["bias"])

    def run(*given: Tensor) -> list[Tensor]:
        x, y, pre, post, residual = given
        x = x.detach().requires_grad_()
        merged = merge_streams(x, y, residual, post)
        _, read, mappings = read_streams(x, *parameters)
        outputs = (merged, read, aggregate_streams(x, pre), *mappings)
        (grad,) = torch.autograd.grad(outputs[:2], x, [torch.ones_like(t) for t in outputs[:2]])
        return [t.detach()[-last:].double() for t in (*outputs, grad)]

    with kernels("triton"):
        whole = run(x, y, pre, post, residual)
        alone = run(*(t[-last:] for t in (x, y, pre, post, residual)))
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(whole, alone, strict=True)]
    return {"passed": max(errors) <= 1e-2, "error_found": max(errors), "elements": x.numel()}


def _sanitizer(tool: str, seconds: float) -> dict[str, Any]:
    """The verdict of compute-sanitizer on a few cases; empty if it is not on the PATH."""
    if shutil.which("compute-sanitizer") is None:
        return {"passed": None, "note": "compute-sanitizer is not on the PATH"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, str(Path(__file__))],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"passed": None, "note": f"stopped after {seconds:.0f} s"}
    end = "\n".join((done.stdout + done.stderr).splitlines()[-3:])
    return {"passed": done.returncode == 0, "note": end}


def main() -> int:
    """The cases that the sanitizer watches; the number that failed."""
    rows = [row for case in _WATCHED for row in check_case(case, "cuda")]
    return sum(not row["passed"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
