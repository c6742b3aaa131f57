"""Peak memory: logged where a step is due, and that of the process alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_lightning.callbacks import PeakMemory, process_memory
from mhc_lightning.callbacks.peak_memory import peak_memory
from mhc_lightning.errors import UserError


def test_the_peak_is_logged_where_a_step_is_due(foreign: Any, fit: Any, events: Any) -> None:
    fit(foreign.Module(), PeakMemory(every_n_steps=2), max_steps=5)
    points = events().Scalars("train/peak_memory_bytes")
    assert [point.step for point in points] == [2, 4]
    assert 50e6 < points[0].value < 1.01 * points[1].value < 1e12
    assert peak_memory(torch.device("meta")) is None


def test_it_grows_by_what_is_held_and_stays() -> None:
    """In a small process of its own, which holds the file alone, started by a large one."""
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('process_memory', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "before = module.peak_resident_bytes()\n"
        "block = b'1' * 80_000_000\n"
        "print(before, module.peak_resident_bytes())\n"
        "del block\n"
        "print(module.peak_resident_bytes())\n"
    )
    command = [sys.executable, "-c", code, str(Path(process_memory.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, held, after = map(int, done.stdout.split())
    assert before < 100_000_000, "that of the process, not of the one that started it"
    assert held - before > 60_000_000
    assert after > 0.99 * held  # the kernel counts in batches


def test_an_interval_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="PeakMemory"):
        PeakMemory(every_n_steps=0)
