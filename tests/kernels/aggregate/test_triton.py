"""Weighted sums of streams, and their gradients, against einsum in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accuracy import assert_close_to_float64, randn
from balanced import balanced
from layouts import LAYOUTS, laid_out

from mhc_lightning.kernels.aggregate.triton import aggregate_backward, aggregate_forward
from mhc_lightning.kernels.expand_mean.triton import expand_backward, mean_forward
from mhc_lightning.kernels.triton_support.block_sizes import Config, choose

CASES: dict[str, Sequence[Any]] = {
    "tokens": [0, 1, 2, 3, 5],
    "n": range(1, 9),
    # Below, at and beyond the width that a warp takes in one step: 128 of float32, 256 of 16 bits.
    "width": [1, 3, 20, 65, 128, 132, 264],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "scale": [1e-3, 1.0, 1e3],
    "layout": LAYOUTS,
}


@balanced(16, **CASES)
def test_forward(
    tokens: int, n: int, width: int, dtype: torch.dtype, scale: float, layout: str
) -> None:
    streams = laid_out(layout, randn(tokens, n, width, dtype=dtype, scale=scale))
    pre = torch.rand(tokens, n)
    exact = streams.double()
    for read, expected in (
        (aggregate_forward(streams, pre), torch.einsum("tn,tnc->tc", pre.double(), exact)),
        (mean_forward(streams), exact.mean(1)),
        (expand_backward(streams), exact.sum(1)),
    ):
        assert read.dtype == dtype and read.is_contiguous()
        assert_close_to_float64(read, expected)


@balanced(16, **CASES, grad_layout=LAYOUTS, needs=["both", "x", "pre"])
def test_backward(
    tokens: int,
    n: int,
    width: int,
    dtype: torch.dtype,
    scale: float,
    layout: str,
    grad_layout: str,
    needs: str,
) -> None:
    streams = laid_out(layout, randn(tokens, n, width, dtype=dtype))
    grad = laid_out(grad_layout, randn(tokens, width, dtype=dtype, scale=scale))
    pre = torch.rand(tokens, n)
    need_streams, need_pre = needs != "pre", needs != "x"
    streams_grad, pre_grad = aggregate_backward(grad, streams, pre, need_streams, need_pre)
    assert [streams_grad is not None, pre_grad is not None] == [need_streams, need_pre]
    if streams_grad is not None:
        assert streams_grad.dtype == dtype and streams_grad.is_contiguous()
        expected = torch.einsum("tn,tc->tnc", pre.double(), grad.double())
        assert_close_to_float64(streams_grad, expected)
    if pre_grad is not None:
        assert pre_grad.dtype == torch.float32
        expected = torch.einsum("tc,tnc->tn", grad.double(), streams.double())
        assert_close_to_float64(pre_grad, expected)


def test_nothing_needed_is_nothing_done() -> None:
    streams, pre = torch.randn(2, 3, 4), torch.rand(2, 3)
    assert aggregate_backward(torch.randn(2, 4), streams, pre, False, False) == (None, None)


@pytest.mark.parametrize("config", [(1, 64, 1, 1), (8, 16, 4, 1), (2, 1024, 8, 2)])
def test_every_cut_into_programs_gives_the_same(config: tuple[int, int, int, int]) -> None:
    streams, pre, grad = randn(3, 3, 72), torch.rand(3, 3), randn(3, 72)
    with choose("aggregate_forward", Config(*config)):
        read = aggregate_forward(streams, pre)
    with choose("aggregate_backward", Config(*config)):
        streams_grad, pre_grad = aggregate_backward(grad, streams, pre, True, True)
    assert streams_grad is not None and pre_grad is not None
    x, weights, g = streams.double(), pre.double(), grad.double()
    assert_close_to_float64(read, torch.einsum("tn,tnc->tc", weights, x))
    assert_close_to_float64(streams_grad, torch.einsum("tn,tc->tnc", weights, g))
    assert_close_to_float64(pre_grad, torch.einsum("tc,tnc->tn", g, x))
