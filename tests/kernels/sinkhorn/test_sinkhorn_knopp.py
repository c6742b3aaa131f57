"""Sinkhorn-Knopp against the paper's equation, known values and autograd."""

import pytest
import torch
from golden_sinkhorn import GOLDEN, GOLDEN_LOGITS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mhc_lightning.kernels import sinkhorn_knopp

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def equation_9(logits: Tensor, num_iterations: int) -> Tensor:
    matrix = logits.exp()
    for _ in range(num_iterations):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


@pytest.mark.parametrize("num_iterations", [1, 20])
def test_golden_matrices(num_iterations: int) -> None:
    logits = torch.tensor(GOLDEN_LOGITS, dtype=torch.float64)
    expected = torch.tensor(GOLDEN[num_iterations], dtype=torch.float64)
    assert (sinkhorn_knopp(logits, num_iterations) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("logits", "num_iterations", "columns"),
    [
        ("golden", 1, [1.112473, 0.934963, 0.893520, 1.059044]),
        ("golden", 20, [1.000004, 1.000002, 0.999990, 1.000004]),
        ("3 x golden", 10, [1.0417, 0.9905, 0.9620, 1.0058]),
        ("3 x golden", 20, [1.0155, 1.0032, 0.9736, 1.0077]),
        ("3 x golden", 50, [1.0037, 1.0028, 0.9900, 1.0034]),
        ("degenerate", 20, [1.0254, 1.0228, 0.9759, 0.9759]),
        ("degenerate", 100, [1.0019, 1.0019, 0.9981, 0.9981]),
    ],
)
def test_golden_column_sums(logits: str, num_iterations: int, columns: list[float]) -> None:
    matrix = {
        "golden": torch.tensor(GOLDEN_LOGITS, dtype=torch.float64),
        "3 x golden": 3 * torch.tensor(GOLDEN_LOGITS, dtype=torch.float64),
        "degenerate": 10 * torch.eye(4, dtype=torch.float64)[[0, 0, 2, 3]],
    }[logits]
    result = sinkhorn_knopp(matrix, num_iterations)
    # The sheet's four-digit sums are cut or rounded; six-digit ones are rounded.
    tolerance = 1e-6 if logits == "golden" else 1e-4
    assert (result.sum(-2) - torch.tensor(columns, dtype=torch.float64)).abs().max() < tolerance
    assert (result.sum(-1) - 1).abs().max() < 1e-14


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_gradient_is_that_of_the_iteration(n: int, scale: float) -> None:
    logits = (scale * torch.randn(256, n, n, dtype=torch.float64)).requires_grad_()
    weights = torch.randn_like(logits)
    (ours,) = torch.autograd.grad(sinkhorn_knopp(logits), logits, weights)
    (expected,) = torch.autograd.grad(equation_9(logits, 20), logits, weights)
    assert (ours - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max().item())


def test_gradcheck() -> None:
    logits = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sinkhorn_knopp(x, 5), logits)


@given(
    n=st.integers(1, 8),
    bound=st.sampled_from([1e-3, 1.0, 80.0, 1e4]),
    seed=st.integers(0, 2**31),
    iterations=st.integers(1, 30),
)
def test_float32_for_logits_of_any_size(n: int, bound: float, seed: int, iterations: int) -> None:
    torch.manual_seed(seed)
    logits = (2 * torch.rand(64, n, n) - 1) * bound
    matrix = sinkhorn_knopp(logits, iterations)
    assert matrix.dtype == torch.float32
    assert torch.isfinite(matrix).all()
    assert (matrix >= 0).all()
    assert (matrix.sum(-1) - 1).abs().max() < 1e-6
    assert (matrix.sum(-2) <= n + 1e-4).all()


def test_float32_agrees_with_float64_on_wide_logits() -> None:
    logits = (2 * torch.rand(4096, 4, 4, dtype=torch.float64) - 1) * 80
    exact = sinkhorn_knopp(logits)
    rounded = sinkhorn_knopp(logits.float())
    expected = sinkhorn_knopp(logits.float().double())  # rounding the input is not our error
    assert torch.isfinite(exact).all()
    assert (rounded.double() - expected).abs().max() < 1e-5


def test_leading_shapes_strides_and_dtypes() -> None:
    logits = torch.randn(4, 4, 2, 5)
    strided = logits.permute(2, 3, 1, 0)
    assert torch.equal(sinkhorn_knopp(strided), sinkhorn_knopp(strided.contiguous()))
    assert sinkhorn_knopp(torch.randn(4, 4)).shape == (4, 4)
    assert sinkhorn_knopp(torch.randn(0, 3, 3)).shape == (0, 3, 3)
    assert sinkhorn_knopp(torch.randn(2, 3, 3).bfloat16()).dtype == torch.float32
    assert sinkhorn_knopp(torch.randn(2, 3, 3).double()).dtype == torch.float64


def test_one_stream_is_the_number_one() -> None:
    logits = torch.randn(7, 1, 1, requires_grad=True)
    matrix = sinkhorn_knopp(logits)
    (gradient,) = torch.autograd.grad(matrix.sum(), logits)
    assert torch.equal(matrix, torch.ones(7, 1, 1))
    assert torch.equal(gradient, torch.zeros(7, 1, 1))


def test_autograd_keeps_the_logits_only() -> None:
    logits = torch.randn(1000, 4, 4, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sinkhorn_knopp(logits)
    assert sum(tensor.numel() for tensor in saved) == logits.numel()


def test_compiles_without_a_break() -> None:
    logits = torch.randn(5, 4, 4, requires_grad=True)
    compiled = torch.compile(sinkhorn_knopp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), sinkhorn_knopp(logits))
    (ours,) = torch.autograd.grad(compiled(logits).square().sum(), logits)
    (expected,) = torch.autograd.grad(sinkhorn_knopp(logits).square().sum(), logits)
    assert torch.equal(ours, expected)


def test_operators_are_registered_correctly() -> None:
    logits = torch.randn(4, 4, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.mhc_lightning.sinkhorn_knopp, (logits, 3))
    torch.library.opcheck(
        torch.ops.mhc_lightning.sinkhorn_knopp_backward,
        (torch.randn(4, 4, 6), logits.detach(), 3),
    )


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"\[\.\.\., n, n\]"):
        sinkhorn_knopp(torch.randn(3, 4))
    with pytest.raises(ValueError, match="at least 1, not 0"):
        sinkhorn_knopp(torch.randn(4, 4), 0)
