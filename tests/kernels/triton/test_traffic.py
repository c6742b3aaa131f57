"""Every kernel reads and writes each stream-sized operand once, and little else."""

import math

import pytest
import torch

from kernel_traffic import connection_traffic, kernel_traffic, many_tokens_per_program
from mhc_lightning.kernels.triton.project_backward import streams_per_program
from mhc_lightning.kernels.triton.workloads import workloads

NAMES = [name for name, work in workloads(1, 1, 16, torch.bfloat16).items() if work.elements]


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("MHC_LIGHTNING_KERNELS", "triton")


@pytest.mark.parametrize("name", NAMES)
def test_kernel_moves_what_it_has_to(name):
    tokens, n, width = 4096, 4, 512
    with many_tokens_per_program(n, width, 2):
        every = kernel_traffic(tokens, n, width, only=name)
        (moved,) = (moved for moved in every if moved.name == name)
    assert moved.streams == moved.ideal, moved.table
    assert moved.ratio <= 1.05, moved.table


# Enough tokens for phi not to be taken for streams.
@pytest.mark.parametrize(
    ("tokens", "n", "width", "dtype"), [(50, 3, 100, torch.float16), (450, 7, 68, torch.float32)]
)
def test_odd_shapes_move_nothing_twice(tokens, n, width, dtype):
    with many_tokens_per_program(n, width, dtype.itemsize):
        moved = {moved.name: moved for moved in kernel_traffic(tokens, n, width, dtype)}
    ratios = {name: m.streams / m.ideal for name, m in moved.items() if m.ideal and name in NAMES}
    expected = dict.fromkeys(ratios, 1.0)
    if n > 4:  # the gradient of the sub-layer's input is read once per program's streams
        programs = math.ceil(n / streams_per_program(n, dtype.itemsize))
        expected["project_backward"] = (3 * n + programs) / (3 * n + 1)
    assert ratios == pytest.approx(expected, abs=1e-12)
    assert len(ratios) >= 10


def test_whole_connection_with_the_sum_of_its_gradients(monkeypatch):
    with many_tokens_per_program(4, 512, 2):
        moved = connection_traffic(4096, 4, 512)
    # 98 C bytes are the least for separate kernels; that the gradient from the merge is added to
    # the one from reading, for 2 C more than nothing, is not in them.
    assert moved.streams == 100 * 512, moved.table
    assert moved.ratio <= 1.05, moved.table
