"""Sinkhorn-Knopp and its gradient against autograd of the equation in float64, and known values."""

import pytest
import torch
from accuracy import assert_close_to_float64
from balanced import balanced
from golden_sinkhorn import GOLDEN, GOLDEN_LOGITS
from torch import Tensor

from mhc_lightning.kernels.sinkhorn.triton import sinkhorn_backward, sinkhorn_forward


def equation_9(logits: Tensor, num_iterations: int) -> Tensor:
    """On [n, n, tokens]."""
    matrix = logits.exp()
    for _ in range(num_iterations):
        matrix = matrix / matrix.sum(0, keepdim=True)
        matrix = matrix / matrix.sum(1, keepdim=True)
    return matrix


def draw(kind: str, n: int, tokens: int) -> Tensor:
    """Logits: uniform up to a bound, only its extremes, or near the identity's."""
    uniform = 2 * torch.rand(n, n, tokens) - 1
    if kind == "extremes of 80":
        return 80 * uniform.sign()
    if kind == "near identity":
        return 0.1 * uniform - 8 * (1 - torch.eye(n))[:, :, None]
    return float(kind) * uniform


@balanced(
    24,
    n=range(1, 9),
    tokens=[0, 1, 7, 33],
    kind=["0.001", "1", "10", "80", "extremes of 80", "near identity"],
    num_iterations=[1, 2, 3, 6, 7, 12, 20],
)
def test_matrices_and_gradients(n: int, tokens: int, kind: str, num_iterations: int) -> None:
    logits, grad = draw(kind, n, tokens), torch.randn(n, n, tokens)
    exact = logits.double().requires_grad_()
    expected = equation_9(exact, num_iterations)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    matrices = sinkhorn_forward(logits, num_iterations)
    assert_close_to_float64(matrices, expected.detach())
    assert ((matrices.sum(1) - 1).abs() <= 1e-6).all()
    actual_grad = sinkhorn_backward(grad, logits, num_iterations)
    if kind == "near identity" and n > 1:
        assert_close_to_float64(actual_grad, expected_grad)
    elif tokens > 0:
        # Where few logits decide, entries of 1 - δ leave a gradient of δ times the incoming one,
        # and their rounding (2⁻²⁴, some few times) stays in it.
        error = (actual_grad.double() - expected_grad).abs().max()
        assert error <= 1e-5 * expected_grad.abs().max() + 3e-7 * grad.abs().max()


@pytest.mark.parametrize("num_iterations", [1, 20])
def test_golden_matrices(num_iterations: int) -> None:
    logits = torch.tensor(GOLDEN_LOGITS)[:, :, None]
    expected = torch.tensor(GOLDEN[num_iterations])[:, :, None]
    assert (sinkhorn_forward(logits, num_iterations) - expected).abs().max() < 1e-6


def test_absurd_logits_stay_finite() -> None:
    logits = (2 * torch.rand(5, 5, 40) - 1) * 1e6
    matrices = sinkhorn_forward(logits, 20)
    assert ((matrices.sum(1) - 1).abs() <= 1e-6).all()
    assert torch.isfinite(sinkhorn_backward(torch.randn(5, 5, 40), logits, 20)).all()
