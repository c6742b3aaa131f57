"""mHC's coefficients and their gradients against autograd of equations 15 to 19 in float64."""

from typing import Any

import pytest
import torch
from accuracy import assert_close_to_float64, randn
from balanced import balanced
from torch import Tensor

from mhc_lightning.kernels.mappings import MappingGrads
from mhc_lightning.kernels.read.triton.coefficients import (
    coefficients_backward,
    coefficients_forward,
)


def equations_15_to_19(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    raw, squares, alpha, bias, n, width, num_iterations, eps = given
    normed = raw * torch.rsqrt(squares / width + eps)
    pre, post, residual = (
        (part * gate + shift[:, None]).T
        for part, gate, shift in zip(
            normed.split([n, n, n * n]), alpha, bias.split([n, n, n * n]), strict=True
        )
    )
    matrix = residual.reshape(-1, n, n).exp()
    for _ in range(num_iterations):
        matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = matrix / matrix.sum(2, keepdim=True)
    return pre.sigmoid(), 2 * post.sigmoid(), matrix


@balanced(
    20,
    n=range(1, 9),
    tokens=[0, 1, 9, 33],
    splits=[1, 2, 3],
    num_iterations=[1, 4, 13],
    scale=[1e-3, 1.0, 1e3],
    logit_scale=[0.01, 1.0],
    has_grad=[(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)],
)
def test_coefficients_and_gradients(
    n: int,
    tokens: int,
    splits: int,
    num_iterations: int,
    scale: float,
    logit_scale: float,
    has_grad: tuple[int, int, int],
) -> None:
    width, eps = 7 * n, 1e-20
    raw_partials = randn(splits, n * n + 2 * n, tokens, scale=scale)
    # A token's norm is as large as its raw coefficients, as for any streams. Were it far smaller,
    # logits would saturate the matrix. From entries of 1 - δ comes a gradient of δ times the
    # incoming one, and float32 has no digits of δ left, neither here nor in plain torch.
    square_partials = (0.5 + torch.rand(splits, tokens)) * width * scale**2
    alpha = (torch.rand(3) + 0.5) * logit_scale
    bias = randn(n * n + 2 * n)
    constants = (n, width, num_iterations)
    *mappings, raw, inverse_rms = coefficients_forward(
        raw_partials, square_partials, alpha, bias, *constants, eps
    )

    exact = [
        t.double().requires_grad_()
        for t in (raw_partials.double().sum(0), square_partials.double().sum(0), alpha, bias)
    ]
    expected = equations_15_to_19(*exact, *constants, eps)
    for actual, reference in zip(mappings, expected, strict=True):
        assert_close_to_float64(actual, reference.detach())

    grads = [
        torch.randn_like(m) if given else None for m, given in zip(mappings, has_grad, strict=True)
    ]
    actual_grads = coefficients_backward(
        MappingGrads(*grads), raw, inverse_rms, alpha, bias, *constants
    )
    total = sum((e * g).sum() for e, g in zip(expected, grads, strict=True) if g is not None)
    raw_grad, squares_grad, alpha_grad, bias_grad = torch.autograd.grad(total, exact)  # type: ignore[arg-type]
    # The streams' gradient through Σx² is 2x times that of Σx².
    expected_grads = (raw_grad, 2 * squares_grad, alpha_grad, bias_grad)
    for actual, reference in zip(actual_grads, expected_grads, strict=True):
        if n == 1 and has_grad == (0, 0, 1):
            assert (actual == 0).all()  # a 1 x 1 matrix is 1, whatever its logit
        else:
            assert_close_to_float64(actual, reference)


@pytest.mark.parametrize("n", [2, 4, 7])
def test_logits_of_80(n: int) -> None:
    tokens, count = 17, n * n + 2 * n
    raw = 160 * torch.rand(1, count, tokens) - 80
    squares, alpha, bias = torch.ones(1, tokens), torch.ones(3), torch.zeros(count)
    constants = (n, 1, 20)
    *mappings, _, inverse_rms = coefficients_forward(raw, squares, alpha, bias, *constants, 1e-20)
    grads = MappingGrads(*(torch.randn_like(m) for m in mappings))
    results = coefficients_backward(grads, raw[0], inverse_rms, alpha, bias, *constants)

    exact = [t.double().requires_grad_() for t in (raw[0], squares[0], alpha, bias)]
    expected = equations_15_to_19(*exact, *constants, 1e-20)
    for actual, reference in zip(mappings, expected, strict=True):
        assert_close_to_float64(actual, reference.detach())
    totals = [(e * g).sum() for e, g in zip(expected, grads, strict=True)]
    expected_grads = list(torch.autograd.grad(totals, exact))
    expected_grads[1] *= 2
    for actual, reference in zip(results, expected_grads, strict=True):
        assert_close_to_float64(actual, reference)


def test_streams_of_zeros_give_finite_gradients() -> None:
    n = 4
    alpha, bias = torch.ones(3), torch.randn(n * n + 2 * n)
    *mappings, raw, inverse_rms = coefficients_forward(
        torch.zeros(1, n * n + 2 * n, 3), torch.zeros(1, 3), alpha, bias, n, 8 * n, 20, 1e-20
    )
    grads = MappingGrads(*(torch.randn_like(m) for m in mappings))
    results = coefficients_backward(grads, raw, inverse_rms, alpha, bias, n, 8 * n, 20)
    assert all(torch.isfinite(t).all() for t in (*mappings, *results))
