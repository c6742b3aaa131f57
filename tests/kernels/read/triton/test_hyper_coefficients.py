"""The coefficients of Hyper-Connections against autograd of their formulas in float64."""

import pytest
import torch
from accuracy import assert_close_to_float64, randn
from balanced import balanced
from torch import Tensor

from mhc_lightning.kernels.mappings import MappingGrads
from mhc_lightning.kernels.read.triton.hyper_coefficients import (
    hyper_coefficients_backward,
    hyper_coefficients_forward,
)


def formulas(
    operands: list[Tensor], n: int, width: int, tanh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    raw, squares, alpha, bias = operands
    z = raw * torch.rsqrt(squares / width + 1e-20)
    z = (z.tanh() if tanh else z).view(n + 2, -1, n)
    pre, post, residual = bias.split([n, n, n * n])
    return (
        alpha[0] * z[0] + pre,
        alpha[1] * z[1] + post,
        alpha[0] * z[2:].transpose(0, 1) + residual.view(n, n),
    )


@balanced(
    20,
    n=range(1, 9),
    tokens=[0, 1, 9, 33],
    splits=[1, 2, 3],
    tanh=[True, False],
    scale=[1e-3, 1.0, 1e3],
    raw_scale=[1e-3, 1.0, 30.0],
    has_grad=[(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)],
)
def test_coefficients_and_gradients(
    n: int,
    tokens: int,
    splits: int,
    tanh: bool,
    scale: float,
    raw_scale: float,
    has_grad: tuple[int, int, int],
) -> None:
    width = 7
    raw_partials = randn(splits, n + 2, tokens * n, scale=scale * raw_scale)
    square_partials = randn(splits, tokens * n, scale=scale).square() * width + (0.1 * scale) ** 2
    alpha, bias = torch.rand(2) + 0.5, randn(n * n + 2 * n)
    constants = (n, width, tanh)
    *mappings, raw, inverse_rms = hyper_coefficients_forward(
        raw_partials, square_partials, alpha, bias, *constants, 1e-20
    )

    exact = [
        t.double().requires_grad_()
        for t in (raw_partials.double().sum(0), square_partials.double().sum(0), alpha, bias)
    ]
    expected = formulas(exact, *constants)
    for actual, reference in zip(mappings, expected, strict=True):
        assert_close_to_float64(actual, reference.detach())

    grads = MappingGrads(
        *(
            torch.randn_like(m) if given else None
            for m, given in zip(mappings, has_grad, strict=True)
        )
    )
    actual_grads = hyper_coefficients_backward(grads, raw, inverse_rms, alpha, *constants)
    totals = [(e * g).sum() for e, g in zip(expected, grads, strict=True) if g is not None]
    raw_grad, squares_grad, alpha_grad, bias_grad = torch.autograd.grad(totals, exact)
    # A stream's gradient through Σx² is 2x times that of Σx².
    expected_grads = (raw_grad, 2 * squares_grad, alpha_grad, bias_grad)
    for actual, reference in zip(actual_grads, expected_grads, strict=True):
        assert_close_to_float64(actual, reference)


@pytest.mark.parametrize("scale", [1e-4, 0.1, 1.0, 30.0])
def test_tanh_is_exact_in_every_digit(scale: float) -> None:
    """The dynamic part alone, relative to each entry: weights near zero have to learn too."""
    raw = randn(1, 3, 400, scale=scale)
    pre, _, _, _, _ = hyper_coefficients_forward(
        raw, torch.ones(1, 400), torch.ones(2), torch.zeros(3), 1, 1, True, 1e-20
    )
    expected = raw[0, 0].double().tanh()
    assert ((pre[:, 0].double() - expected).abs() <= 1e-6 * expected.abs()).all()
