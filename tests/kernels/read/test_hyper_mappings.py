"""Hyper-Connections' mappings against equation 5 of the mHC paper, token by token."""

import pytest
import torch

from mhc_lightning.kernels import hyper_mappings

pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_against_equation_5(n: int, tanh: bool) -> None:
    width = 6
    streams = torch.randn(3, n, width, dtype=torch.float64)
    phi = torch.randn(width, n + 2, dtype=torch.float64)
    alpha = torch.randn(2, dtype=torch.float64)
    bias = torch.randn(n * n + 2 * n, dtype=torch.float64)
    mappings = hyper_mappings(streams, phi, alpha, bias, tanh=tanh, eps=0.0)
    act = torch.tanh if tanh else (lambda x: x)
    for token in range(3):
        for j in range(n):
            x = streams[token, j]
            z = act(x / x.square().mean().sqrt() @ phi)
            pre = alpha[0] * z[0] + bias[j]
            post = alpha[1] * z[1] + bias[n + j]
            assert (mappings.pre[token, j] - pre).abs() < 1e-12
            assert (mappings.post[token, j] - post).abs() < 1e-12
            for i in range(n):
                residual = alpha[0] * z[2 + i] + bias[2 * n + i * n + j]
                assert (mappings.residual[token, i, j] - residual).abs() < 1e-12


def test_coefficients_are_float32_for_bfloat16_streams_and_under_autocast() -> None:
    streams = torch.randn(3, 4, 8)
    rest = torch.randn(8, 6), torch.randn(2), torch.randn(24)
    low = hyper_mappings(streams.bfloat16(), *rest)
    assert {m.dtype for m in low} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hyper_mappings(streams, *rest)
    assert torch.equal(inside.residual, hyper_mappings(streams, *rest).residual)
