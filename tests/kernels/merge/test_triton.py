"""Merging and its gradients against einsum in float64."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accuracy import assert_close_to_float64, randn
from balanced import balanced
from layouts import LAYOUTS, laid_out
from torch import Tensor

from mhc_lightning.kernels.merge.triton import merge_backward, merge_forward
from mhc_lightning.kernels.triton_support.block_sizes import Config, choose

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES: dict[str, Sequence[Any]] = {
    "tokens": [0, 1, 2, 3, 5],
    "n": range(1, 9),
    # Below, at and beyond the width that a warp takes in one step: 128 of float32, 256 of 16 bits.
    "width": [1, 3, 20, 65, 128, 132, 264],
    "dtype": DTYPES,
    "scale": [1e-3, 1.0, 1e3],
    "layout": LAYOUTS,
    "output_layout": LAYOUTS,
}


def coefficients(tokens: int, n: int) -> tuple[Tensor, Tensor]:
    """Rows that sum to about one, write weights up to two."""
    return 2 * torch.rand(tokens, n, n) / n, 2 * torch.rand(tokens, n)


def exact_merge(streams: Tensor, output: Tensor, residual: Tensor, post: Tensor) -> Tensor:
    x, y, mix, weights = (tensor.double() for tensor in (streams, output, residual, post))
    return torch.einsum("tij,tjc->tic", mix, x) + torch.einsum("ti,tc->tic", weights, y)


def exact_gradients(
    grad: Tensor, streams: Tensor, output: Tensor, residual: Tensor, post: Tensor
) -> list[Tensor]:
    g, x, y, mix, weights = (t.double() for t in (grad, streams, output, residual, post))
    return [
        torch.einsum("tij,tic->tjc", mix, g),
        torch.einsum("ti,tic->tc", weights, g),
        torch.einsum("tic,tjc->tij", g, x),
        torch.einsum("tic,tc->ti", g, y),
    ]


@balanced(16, **CASES, output_dtype=DTYPES)
def test_forward(
    tokens: int,
    n: int,
    width: int,
    dtype: torch.dtype,
    scale: float,
    layout: str,
    output_layout: str,
    output_dtype: torch.dtype,
) -> None:
    streams = laid_out(layout, randn(tokens, n, width, dtype=dtype, scale=scale))
    output = laid_out(output_layout, randn(tokens, width, dtype=output_dtype, scale=scale))
    residual, post = coefficients(tokens, n)
    merged = merge_forward(streams, output, residual, post)
    assert merged.dtype == dtype and merged.is_contiguous()
    assert_close_to_float64(merged, exact_merge(streams, output, residual, post))


@balanced(
    24,
    **CASES,
    output_dtype=DTYPES,
    grad_layout=LAYOUTS,
    needs=list(itertools.product([True, False], repeat=3)),
)
def test_backward(
    tokens: int,
    n: int,
    width: int,
    dtype: torch.dtype,
    scale: float,
    layout: str,
    output_layout: str,
    output_dtype: torch.dtype,
    grad_layout: str,
    needs: tuple[bool, bool, bool],
) -> None:
    streams = laid_out(layout, randn(tokens, n, width, dtype=dtype))
    output = laid_out(output_layout, randn(tokens, width, dtype=output_dtype))
    grad = laid_out(grad_layout, randn(tokens, n, width, dtype=dtype, scale=scale))
    residual, post = coefficients(tokens, n)
    actual = merge_backward(grad, streams, output, residual, post, *needs)
    assert [tensor is not None for tensor in actual] == [*needs, needs[2]]
    dtypes = [dtype, output_dtype, torch.float32, torch.float32]
    expected = exact_gradients(grad, streams, output, residual, post)
    for ours, theirs, kind in zip(actual, expected, dtypes, strict=True):
        if ours is not None:
            assert ours.dtype == kind and ours.is_contiguous()
            assert_close_to_float64(ours, theirs)


@pytest.mark.parametrize(
    ("config", "n"), [((1, 64, 1, 1), 6), ((8, 16, 4, 1), 3), ((2, 1024, 8, 2), 6)]
)
def test_every_cut_into_programs_gives_the_same(config: tuple[int, int, int, int], n: int) -> None:
    streams, output, grad = randn(3, n, 72), randn(3, 72), randn(3, n, 72)
    residual, post = coefficients(3, n)
    with choose("merge_forward", Config(*config)):
        merged = merge_forward(streams, output, residual, post)
    assert_close_to_float64(merged, exact_merge(streams, output, residual, post))
    with choose("merge_backward", Config(*config)):
        actual = merge_backward(grad, streams, output, residual, post, True, True, True)
    expected = exact_gradients(grad, streams, output, residual, post)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours is not None
        assert_close_to_float64(ours, theirs)
