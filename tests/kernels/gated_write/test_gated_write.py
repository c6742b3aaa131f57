"""Gated writes and their gradients, by both backends, against their equation in float64."""

from typing import Any

import pytest
import torch
from accuracy import assert_close_to_float64, randn
from balanced import balanced
from layouts import LAYOUTS, laid_out
from memory_definitions import exact_write

from mhc_lightning.kernels import gated_write
from mhc_lightning.kernels.gated_write.operands import WriteOperands
from mhc_lightning.kernels.gated_write.triton import write_backward, write_forward
from mhc_lightning.kernels.triton_support.block_sizes import Config, choose

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
run: Any = gated_write  # with lists of tensors
run_exactly: Any = exact_write


@balanced(
    20,
    backend=["torch", "triton"],
    batch=[1, 2],
    length=[1, 2, 4, 7, 11],
    n=range(1, 9),
    width=[1, 3, 20, 65, 136],
    kernel=[0, 1, 2, 3, 4],
    dilation=[1, 2, 3],
    continued=[True, False],
    dtype=DTYPES,
    value_dtype=DTYPES,
    layout=LAYOUTS,
    grad_layout=LAYOUTS,
)
def test_against_float64(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    batch: int,
    length: int,
    n: int,
    width: int,
    kernel: int,
    dilation: int,
    continued: bool,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
    layout: str,
    grad_layout: str,
) -> None:
    """With and without taps; beginning a sequence, and continuing one."""
    monkeypatch.setenv("MHC_LIGHTNING_KERNELS", backend)
    positions = length + (max(kernel - 1, 0) * dilation if continued else 0)
    streams = laid_out(layout, randn(batch, length, n, width, dtype=dtype))
    value = randn(batch, positions, width, dtype=value_dtype)
    gate = torch.rand(batch, positions, n)
    operands = [streams, value, gate, *([randn(kernel, n, width)] if kernel else [])]
    leaves: list[Any] = [t.requires_grad_() for t in operands]
    doubles: list[Any] = [t.detach().double().requires_grad_() for t in leaves]
    # Fewer programs than by default: the interpreter runs one after the other.
    end = "_convolved" if kernel else ""
    with choose(f"gated_write_backward{end}", Config(16, 64, 4, 1)):
        new = run(*leaves[:3], leaves[3] if kernel else None, dilation)
        grad = laid_out(grad_layout, randn(batch, length, n, width, dtype=dtype))
        grads = torch.autograd.grad(new, leaves, grad)
    exact = run_exactly(*doubles[:3], doubles[3] if kernel else None, dilation)
    assert new.dtype == dtype
    assert_close_to_float64(new, exact.detach())
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]
    for a, b in zip(grads, torch.autograd.grad(exact, doubles, grad.double()), strict=True):
        assert_close_to_float64(a, b)


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("config", [(64, 64, 4, 1), (512, 16, 4, 1)])
def test_every_cut_into_programs_gives_the_same(
    config: tuple[int, int, int, int], count: int
) -> None:
    """Positions enough for two ranges of programs, the second one shorter."""
    batch, length, n, width = 2, 150, 2, 40
    streams, grad = (randn(batch, length, n, width) for _ in range(2))
    taps = randn(count, n, width) if count else None
    operands = WriteOperands(randn(batch, length, width), torch.rand(batch, length, n), taps, 3)
    end = "_convolved" if count else ""
    with choose(f"gated_write_forward{end}", Config(*config)):
        new = write_forward(streams, operands)
    with choose(f"gated_write_backward{end}", Config(*config)):
        grads = write_backward(grad, operands)
    doubles: list[Any] = [t.double().requires_grad_() for t in (operands.value, operands.gate)]
    if taps is not None:
        doubles.append(taps.double().requires_grad_())
    exact = run_exactly(streams.double(), *doubles[:2], doubles[2] if count else None, 3)
    assert_close_to_float64(new, exact.detach())
    expected = torch.autograd.grad(exact, doubles, grad.double())
    for a, b in zip((g for g in grads if g is not None), expected, strict=True):
        assert_close_to_float64(a, b)


@pytest.mark.parametrize(("batch", "length"), [(1, 520), (2, 280), (40, 9)])
def test_many_tokens_are_cut_into_pieces_with_the_same_result(
    batch: int, length: int, cpu_kernels: str
) -> None:
    """Parts of one sequence, of each of several, and several short sequences together."""
    n, width, count, dilation = 4, 256, 4, 3
    operands = [
        randn(batch, length, n, width),
        randn(batch, length, width),
        torch.rand(batch, length, n),
        randn(count, n, width),
    ]
    leaves: list[Any] = [t.requires_grad_() for t in operands]
    doubles: list[Any] = [t.detach().double().requires_grad_() for t in leaves]
    grad = randn(batch, length, n, width)
    new, exact = run(*leaves, dilation=dilation), run_exactly(*doubles, dilation=dilation)
    assert_close_to_float64(new.detach(), exact.detach())
    ours = torch.autograd.grad(new, leaves, grad)
    for a, b in zip(ours, torch.autograd.grad(exact, doubles, grad.double()), strict=True):
        assert_close_to_float64(a, b)
    again = torch.autograd.grad(run(*leaves, dilation=dilation), leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("before", [0, 4])
def test_gradients_in_float64(before: int, cpu_kernels: str) -> None:
    shapes = [(2, 5, 3, 4), (2, 5 + before, 4), (2, 5 + before, 3), (3, 3, 4)]
    leaves: list[Any] = [randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *t: run(*t, dilation=2), leaves)
    if before == 0:
        assert torch.autograd.gradcheck(gated_write, leaves[:3])


def test_the_gradient_of_the_streams_is_the_gradient_itself() -> None:
    streams, grad = randn(1, 2, 3, 4).requires_grad_(), randn(1, 2, 3, 4)
    new = gated_write(streams, randn(1, 2, 4), torch.rand(1, 2, 3), randn(2, 3, 4), 1)
    (ours,) = torch.autograd.grad(new, streams, grad)
    assert ours.data_ptr() == grad.data_ptr()


def test_shapes_that_do_not_fit_are_named() -> None:
    streams, value, gate = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 8), torch.zeros(2, 3, 4)
    taps = torch.zeros(4, 4, 8)
    with pytest.raises(ValueError, match=r"value must be \[2, 3, 8\]"):
        gated_write(streams, value[..., :4], gate)
    with pytest.raises(ValueError, match=r"gate must be \[2, 3, 4\]"):
        gated_write(streams, value, gate[..., :1])
    with pytest.raises(ValueError, match=r"taps must be \[4, 4, 8\]"):
        gated_write(streams, value, gate, taps[..., :4])
    longer = torch.zeros(2, 5, 8), torch.zeros(2, 5, 4)
    with pytest.raises(ValueError, match="value must have 3 or 12 positions"):
        gated_write(streams, *longer, taps, 3)
    with pytest.raises(ValueError, match="dilation must be at least 1, not 0"):
        gated_write(streams, value, gate, taps, 0)
