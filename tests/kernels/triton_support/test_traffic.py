"""Every kernel reads and writes each stream-sized operand once, and little else."""

import math

import pytest
import torch

from kernel_traffic import (
    connection_traffic,
    fused_connection_traffic,
    kernel_traffic,
    many_tokens_per_program,
)
from mhc_lightning.kernels.mappings import MappingGrads, MappingRule
from mhc_lightning.kernels.merge import triton as merge
from mhc_lightning.kernels.merge_read import by_parts
from mhc_lightning.kernels.merge_read.operands import MergeReadOperands
from mhc_lightning.kernels.read import triton as read
from mhc_lightning.kernels.read.operands import Projection
from mhc_lightning.kernels.read.triton.project_backward import streams_per_program
from mhc_lightning.kernels.triton_support.workloads import DILATION, TAPS, workloads
from traffic_counter import TrafficCounter

NAMES = [name for name, work in workloads(1, 1, 16, torch.bfloat16).items() if work.elements]


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("MHC_LIGHTNING_KERNELS", "triton")


def phi_bytes(accesses: int, tokens: int, n: int, width: int) -> float:
    """Bytes per token by which phi weighs more for so few tokens than for 4,096."""
    return accesses * 4 * n * width * (n * n + 2 * n) * (1 / tokens - 1 / 4096)


def beyond_the_ends(name: str, tokens: int, n: int) -> float:
    """Elements per token, in units of C, that no load of a convolution finds in a sequence."""
    if not name.startswith("gated_write") or not name.endswith("_convolved"):
        return 0
    places = DILATION * TAPS * (TAPS - 1) / 2  # before the first position, and as many behind
    return places * (1 if "forward" in name else n + 2) / tokens


@pytest.mark.parametrize("name", NAMES)
def test_kernel_moves_what_it_has_to(name):
    """Beside the streams at most 5% at 4,096 tokens; the parameters are shared by fewer here."""
    n, width = 4, 512
    tokens = 1024 if "project" in name else 512
    with many_tokens_per_program(n, width, 2):
        (moved,) = kernel_traffic([name], tokens, n, width)
    missing = beyond_the_ends(name, tokens, n) * width * 2
    assert moved.streams == pytest.approx(moved.ideal - missing, abs=1e-6), moved.table
    shared = 0.0
    if "project" in name:  # backward reads phi and writes its gradient
        shared = phi_bytes(2 if "backward" in name else 1, tokens, n, width)
    assert moved.streams + moved.other - shared <= 1.05 * moved.ideal, moved.table


# Enough tokens for phi, and enough of a width for a matrix, not to be taken for streams.
@pytest.mark.parametrize(
    ("tokens", "n", "width", "dtype"), [(50, 3, 36, torch.float16), (180, 5, 36, torch.float32)]
)
def test_odd_shapes_move_nothing_twice(tokens, n, width, dtype):
    names = [name for name in workloads(1, n, 16, dtype) if name in NAMES]
    with many_tokens_per_program(n, width, dtype.itemsize):
        every = kernel_traffic(names, tokens, n, width, dtype)
        ratios = {
            moved.name: moved.streams / moved.ideal
            + beyond_the_ends(moved.name, tokens, n) * width * dtype.itemsize / moved.ideal
            for moved in every
        }
    expected = dict.fromkeys(ratios, 1.0)
    if n > 4:  # the gradient of the sub-layer's input is read once per program's streams
        programs = math.ceil(n / streams_per_program(n, dtype.itemsize))
        expected["project_backward"] = (3 * n + programs) / (3 * n + 1)
    assert ratios == pytest.approx(expected, abs=1e-12)
    assert len(ratios) >= 10


def test_reading_with_a_carry_adds_up_no_streams():
    """By parts, as with more streams than a seam takes: what the separate kernels have to move."""
    tokens, n, width = 256, 4, 32
    x, grad = (torch.randn(tokens, n, width).bfloat16() for _ in range(2))
    y, read_grad = (torch.randn(tokens, width).bfloat16() for _ in range(2))
    carry, post, residual = torch.rand(tokens, n), torch.rand(tokens, n), torch.rand(tokens, n, n)
    count = n * n + 2 * n
    parameters = torch.randn(n * width, count), torch.ones(3), torch.zeros(count)
    operands = MergeReadOperands(x, y, residual, post, *parameters, carry)
    rule = MappingRule("sinkhorn", 20, 1e-20)
    with many_tokens_per_program(n, width, 2):
        with TrafficCounter(tokens, width) as forward:
            given = by_parts.merge_read_forward(merge, read, operands, rule)
        projection = Projection(given.pre, given.raw, given.inverse_rms)
        grads = MappingGrads(carry, post, residual)
        with TrafficCounter(tokens, width) as backward:
            by_parts.merge_read_backward(
                *(merge, read, operands, given.new, projection, grad, read_grad, grads, rule)
            )
    assert forward.stream_bytes == (4 * n + 2) * width * 2, forward.table()
    assert backward.stream_bytes == (7 * n + 4) * width * 2, backward.table()


def test_whole_connection_with_the_sum_of_its_gradients():
    tokens = 512
    with many_tokens_per_program(4, 512, 2):
        moved = connection_traffic(tokens, 4, 512)
    # 98 C bytes are the least for separate kernels; that the gradient from the merge is added to
    # the one from reading, for 2 C more than nothing, is not in them.
    assert moved.streams == 100 * 512, moved.table
    shared = phi_bytes(3, tokens, 4, 512)
    assert moved.streams + moved.other - shared <= 1.05 * moved.ideal, moved.table


@pytest.mark.slow
def test_whole_connection_between_fused_seams():
    tokens = 512
    with many_tokens_per_program(4, 512, 2):
        moved = fused_connection_traffic(tokens, 4, 512)
    assert moved.streams == moved.ideal == 2 * 34 * 512, moved.table
    shared = phi_bytes(3, tokens, 4, 512)
    assert moved.streams + moved.other - shared <= 1.05 * moved.ideal, moved.table
