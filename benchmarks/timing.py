"""Side-by-side timing: interleaved in one process, medians, with what it was measured on."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch


def interleaved_seconds(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Time every case in turn, ``repeats`` times; median, minimum and quartiles in seconds."""
    for case in cases.values():
        for _ in range(warmup):
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            start = clock()
            case()
            seconds[name].append(clock() - start)
    return {name: summary(values) for name, values in seconds.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median, minimum and quartiles."""
    if len(values) < 2:
        values = values * 2
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "minimum": min(values), "quartile_1": low, "quartile_3": high}


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Run the stream operations with ``triton``, ``compiled`` or ``torch``."""
    before = os.environ.get("MHC_LIGHTNING_KERNELS")
    os.environ["MHC_LIGHTNING_KERNELS"] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ["MHC_LIGHTNING_KERNELS"]
        else:
            os.environ["MHC_LIGHTNING_KERNELS"] = before


def environment(device: str = "cpu") -> dict[str, Any]:
    """Device, versions and commit of a measurement on the CPU, or on the GPU (``"cuda"``)."""
    gpu = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        **gpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
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
    return _output("git", "describe", "--always", "--dirty", "--exclude=*")


def _output(*command: str) -> str:
    """The output of a command, or "unknown" if there is no such command or it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
