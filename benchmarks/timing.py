"""Side-by-side timing: interleaved in one process, medians, with what it was measured on."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved_seconds(
    cases: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Time every case in turn, ``repeats`` times; median, minimum and quartiles in seconds."""
    for case in cases.values():
        for _ in range(warmup):
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "minimum": min(values), "quartile_1": low, "quartile_3": high}


def environment() -> dict[str, Any]:
    """Device, versions and commit of a measurement."""
    return {
        "device": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "load_average": os.getloadavg()[0],
    }


def report(name: str, results: dict[str, Any]) -> None:
    """Print one measurement as JSON."""
    print(json.dumps({"benchmark": name, "environment": environment(), **results}, indent=2))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
