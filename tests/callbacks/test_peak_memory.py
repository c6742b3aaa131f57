import subprocess
import sys
from typing import Any

import pytest

from mhc_lightning.callbacks import PeakMemory
from mhc_lightning.errors import UserError


def test_the_peak_is_logged_where_a_step_is_due(foreign: Any, fit: Any, events: Any) -> None:
    fit(foreign.Module(), PeakMemory(every_n_steps=2), max_steps=5)
    found = events().Scalars("train/peak_memory_bytes")
    assert [event.step for event in found] == [2, 4]
    assert 50e6 < found[0].value < 1.01 * found[1].value < 1e12


def test_it_grows_by_what_is_held_and_stays() -> None:
    """In a small process of its own, started by a large one."""
    code = (
        "import torch\n"
        "from mhc_lightning.callbacks.peak_memory import peak_memory\n"
        "cpu = torch.device('cpu')\n"
        "before = peak_memory(cpu)\n"
        "held = torch.ones(before // 4 + 20_000_000)\n"
        "print(before, peak_memory(cpu))\n"
        "del held\n"
        "print(peak_memory(cpu), peak_memory(torch.device('meta')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, held, after, nothing = done.stdout.split()
    assert int(held) - int(before) > 60_000_000
    assert int(after) > 0.99 * int(held) and nothing == "None"  # the kernel counts in batches


def test_an_interval_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="PeakMemory"):
        PeakMemory(every_n_steps=0)
