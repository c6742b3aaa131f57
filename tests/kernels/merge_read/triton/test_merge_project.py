"""The seam's kernels against the same formulas in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accuracy import assert_close_to_float64, randn
from balanced import balanced
from torch import Tensor

from mhc_lightning.kernels.merge_read.triton.merge_project import merge_project
from mhc_lightning.kernels.merge_read.triton.merge_project_backward import merge_project_backward


def formulas(
    x: Tensor, y: Tensor, residual: Tensor, post: Tensor, phi: Tensor, pre: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = torch.einsum("tij,tjc->tic", residual, x) + post[:, :, None] * y[:, None]
    read = torch.einsum("ti,tic->tc", pre, new)
    return new, read, new.flatten(1) @ phi, new.flatten(1).square().sum(1)


def operands(tokens: int, n: int, width: int, dtype: torch.dtype, scale: float) -> list[Tensor]:
    coefficients = n * n + 2 * n
    return [
        randn(tokens, n, width, dtype=dtype, scale=scale),
        randn(tokens, width, dtype=dtype, scale=scale),
        torch.rand(tokens, n, n),
        torch.rand(tokens, n) * 2,
        randn(n * width, coefficients, scale=width**-0.5),
    ]


CASES: dict[str, Sequence[Any]] = {
    "tokens": [0, 1, 16, 17, 40],
    "n": [1, 2, 3, 4],
    "width": [1, 7, 33, 64, 80],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "scale": [1e-3, 1.0, 1e3],
    "single_pass": [False, True],
}


@balanced(16, **CASES)
def test_forward(
    tokens: int, n: int, width: int, dtype: torch.dtype, scale: float, single_pass: bool
) -> None:
    if dtype == torch.float16:
        scale = min(scale, 1.0)
    x, y, residual, post, phi = operands(tokens, n, width, dtype, scale)
    alpha, bias = torch.rand(3), randn(n * n + 2 * n)
    eps = 1e-20
    given_pre = torch.rand(tokens, n) if single_pass else None
    new, read, raw, squares, weights = merge_project(
        x, y, residual, post, phi, alpha, bias, given_pre, eps
    )

    doubles = [t.double() for t in (x, y, residual, post, phi, torch.zeros(tokens, n))]
    expected_new = formulas(*doubles)[0]
    assert new.dtype == read.dtype == dtype
    assert_close_to_float64(new, expected_new)
    # What is read is the streams as they are stored.
    stored = new.double()
    expected_raw = stored.flatten(1) @ phi.double()
    expected_squares = stored.flatten(1).square().sum(1)
    assert_close_to_float64(raw[0], expected_raw.T, dtype)
    assert_close_to_float64(squares[0], expected_squares, torch.float32)
    if given_pre is None:
        gate = alpha[0] * torch.rsqrt(expected_squares / (n * width) + eps)
        pre = torch.sigmoid(gate[:, None] * expected_raw[:, :n] + bias[:n])
    else:
        pre = given_pre.double()
    assert_close_to_float64(weights, pre, dtype)
    assert_close_to_float64(read, torch.einsum("ti,tic->tc", pre, stored))


@balanced(20, **CASES, grads=["both", "new", "read"])
def test_backward(
    tokens: int,
    n: int,
    width: int,
    dtype: torch.dtype,
    scale: float,
    single_pass: bool,
    grads: str,
) -> None:
    if dtype == torch.float16:
        scale = min(scale, 1.0)
    x, y, residual, post, phi = operands(tokens, n, width, dtype, scale)
    pre = torch.rand(tokens, n)
    read_grad = None if grads == "new" else randn(tokens, width, dtype=dtype)
    new_grad = None if grads == "read" else randn(tokens, n, width, dtype=dtype)
    raw_grad = randn(n * n + 2 * n, tokens)
    squares_grad = randn(tokens, scale=0.1)

    actual = merge_project_backward(
        x, y, residual, post, phi, raw_grad, 2 * squares_grad, pre, read_grad, new_grad, single_pass
    )
    leaves = [t.double().requires_grad_() for t in (x, y, residual, post, phi, pre)]
    outputs = formulas(*leaves)
    upstream = (new_grad, read_grad, raw_grad.T, squares_grad)
    totals = [(o * g).sum() for o, g in zip(outputs, upstream, strict=True) if g is not None]
    expected = torch.autograd.grad(totals, leaves, allow_unused=True)
    for result, reference in zip(actual[:5], expected[:5], strict=True):
        assert result is not None and reference is not None
        assert_close_to_float64(result, reference, dtype)
    assert actual[0].dtype == actual[1].dtype == dtype
    if single_pass and read_grad is not None:
        assert actual[5] is not None
        assert_close_to_float64(actual[5], expected[5], dtype)
    else:
        assert actual[5] is None


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_strided_operands(layout: str) -> None:
    tokens, n, width = 9, 4, 40
    x, y, residual, post, phi = operands(tokens, n, width, torch.float32, 1.0)
    if layout == "expanded":
        x = x[:, :1].expand(tokens, n, width)
    else:
        x, y = x.mT.contiguous().mT, y.T.contiguous().T
    alpha, bias = torch.rand(3), randn(n * n + 2 * n)
    arguments = (residual, post, phi, alpha, bias, None, 1e-20)
    for strided, contiguous in zip(
        merge_project(x, y, *arguments),
        merge_project(x.contiguous(), y.contiguous(), *arguments),
        strict=True,
    ):
        assert torch.equal(strided, contiguous)
