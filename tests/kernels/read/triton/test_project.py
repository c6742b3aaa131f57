"""Projection and the backward of reading against the same formulas in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accuracy import assert_close_to_float64, randn
from balanced import balanced

from mhc_lightning.kernels.read.triton.project import project
from mhc_lightning.kernels.read.triton.project_backward import project_backward

CASES: dict[str, Sequence[Any]] = {
    "tokens": [0, 1, 17, 40, 130],
    "n": range(1, 9),
    "width": [1, 7, 33, 64, 80],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "scale": [1e-3, 1.0, 1e3],
    "per_stream": [False, True],
}


def operands(
    tokens: int, n: int, width: int, dtype: torch.dtype, scale: float, per_stream: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    scale = min(scale, 1.0) if dtype == torch.float16 else scale
    rows, coefficients = (width, n + 2) if per_stream else (n * width, n * n + 2 * n)
    streams = randn(tokens, n, width, dtype=dtype, scale=scale)
    return streams, randn(rows, coefficients, scale=rows**-0.5), rows


@balanced(16, **CASES)
def test_project(
    tokens: int, n: int, width: int, dtype: torch.dtype, scale: float, per_stream: bool
) -> None:
    streams, phi, flat_width = operands(tokens, n, width, dtype, scale, per_stream)
    raw, squares = project(streams, phi, per_stream=per_stream)
    flat = streams.double().reshape(-1, flat_width)
    assert_close_to_float64(raw.sum(0), (flat @ phi.double()).T, dtype)
    assert_close_to_float64(squares.sum(0), flat.square().sum(1))


def test_short_batches_of_wide_streams_are_split() -> None:
    streams, phi, _ = operands(3, 4, 1024, torch.float32, 1.0, False)
    raw, squares = project(streams, phi)
    assert raw.shape[0] == squares.shape[0] > 1
    assert_close_to_float64(raw.sum(0), (streams.double().flatten(1) @ phi.double()).T)


@balanced(
    24, **CASES, has_read=[True, False], has_kept=[True, False], needs=["both", "streams", "phi"]
)
def test_read_backward(
    tokens: int,
    n: int,
    width: int,
    dtype: torch.dtype,
    scale: float,
    per_stream: bool,
    has_read: bool,
    has_kept: bool,
    needs: str,
) -> None:
    streams, phi, flat_width = operands(tokens, n, width, dtype, scale, per_stream)
    rows = tokens * n if per_stream else tokens
    raw_grad, squares_grad = randn(phi.shape[1], rows), randn(rows, scale=0.1)
    pre = torch.rand(tokens, n)
    read_grad = randn(tokens, width, dtype=dtype) if has_read else None
    kept_grad = randn(tokens, n, width, dtype=dtype) if has_kept else None
    actual = project_backward(
        streams,
        phi,
        raw_grad,
        2 * squares_grad,
        pre,
        read_grad,
        kept_grad,
        need_streams=needs != "phi",
        need_phi=needs != "streams",
        per_stream=per_stream,
    )

    x, weights = streams.double().requires_grad_(), phi.double().requires_grad_()
    flat = x.reshape(-1, flat_width)
    total = (flat @ weights * raw_grad.T).sum() + (flat.square().sum(1) * squares_grad).sum()
    if read_grad is not None:
        total = total + (torch.einsum("ti,tic->tc", pre.double(), x) * read_grad).sum()
    if kept_grad is not None:
        total = total + (x * kept_grad).sum()
    expected = torch.autograd.grad(total, (x, weights))
    for name, result, reference in zip(("streams", "phi"), actual, expected, strict=True):
        if needs in ("both", name):
            assert result is not None
            assert_close_to_float64(result, reference, dtype)
        else:
            assert result is None


@pytest.mark.parametrize("per_stream", [False, True])
def test_tokens_in_several_ranges_add_up(per_stream: bool) -> None:
    tokens, n, width = 1100, 2, 16
    streams, phi, flat_width = operands(tokens, n, width, torch.float32, 1.0, per_stream)
    rows = tokens * n if per_stream else tokens
    raw_grad = randn(phi.shape[1], rows)
    nothing = torch.zeros(rows)
    pre = torch.zeros(tokens, n)
    _, phi_grad = project_backward(
        streams, phi, raw_grad, nothing, pre, None, None, False, True, per_stream
    )
    assert phi_grad is not None
    expected = streams.double().reshape(-1, flat_width).T @ raw_grad.double().T
    assert_close_to_float64(phi_grad, expected)
