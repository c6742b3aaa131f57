"""mHC's mappings against the paper's equations 7 to 9, written out naively in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mhc_lightning.kernels import StreamMappings, read_streams, stream_mappings

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def equations_7_to_9(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, iterations: int = 20, eps: float = 0
) -> StreamMappings:
    *leading, n, width = streams.shape
    flat = streams.reshape(*leading, n * width)
    normed = flat / ((flat**2).mean(-1, keepdim=True) + eps).sqrt()
    pre = alpha[0] * (normed @ phi[:, :n]) + bias[:n]
    post = alpha[1] * (normed @ phi[:, n : 2 * n]) + bias[n : 2 * n]
    residual = alpha[2] * (normed @ phi[:, 2 * n :]) + bias[2 * n :]
    matrix = residual.reshape(*leading, n, n).exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return StreamMappings(pre.sigmoid(), 2 * post.sigmoid(), matrix)


def operands(n: int, width: int, leading: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    """Tensors; to be unpacked as arguments that other types follow, no `list[Tensor]`."""
    coefficients = n * n + 2 * n
    return [
        torch.randn(*leading, n, width, dtype=dtype, requires_grad=True),
        (torch.randn(n * width, coefficients, dtype=dtype) / math.sqrt(n * width)).requires_grad_(),
        torch.rand(3, dtype=dtype).add_(0.5).requires_grad_(),
        torch.randn(coefficients, dtype=dtype, requires_grad=True),
    ]


def gradients(mappings: StreamMappings, inputs: list[Tensor], weights: StreamMappings) -> list:
    return list(torch.autograd.grad(mappings, inputs, weights))


@given(n=st.integers(1, 8), width=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_values_and_gradients_in_float64(n: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = operands(n, width, (2, 3), torch.float64)
    streams, phi, alpha, bias = inputs
    ours = stream_mappings(streams, phi, alpha, bias, eps=1e-3)
    expected = equations_7_to_9(streams, phi, alpha, bias, eps=1e-3)
    weights = StreamMappings(*(torch.randn_like(m) for m in expected))
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-12
    for a, b in zip(
        gradients(ours, inputs, weights), gradients(expected, inputs, weights), strict=True
    ):
        assert (a - b).abs().max() <= 1e-11 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_float32_against_float64_at_any_scale(scale: float) -> None:
    inputs: list[Any] = [
        t.detach().requires_grad_() for t in operands(4, 512, (64,), torch.float32)
    ]
    inputs[0] = (inputs[0].detach() * scale).requires_grad_()
    exact: list[Any] = [t.detach().double().requires_grad_() for t in inputs]
    ours, expected = stream_mappings(*inputs), equations_7_to_9(*exact)
    weights = StreamMappings(*(torch.randn_like(m) for m in ours))
    ours_grads = gradients(ours, inputs, weights)
    expected_grads = gradients(expected, exact, StreamMappings(*(w.double() for w in weights)))
    for a, b in [*zip(ours, expected, strict=True), *zip(ours_grads, expected_grads, strict=True)]:
        assert a.dtype == torch.float32
        assert (a.double() - b).abs().max() / b.abs().max() < 1e-5


def test_mappings_of_bfloat16_streams_are_float32() -> None:
    streams, phi, alpha, bias = operands(4, 64, (10,), torch.float32)
    low = streams.detach().bfloat16().requires_grad_()
    ours = stream_mappings(low, phi, alpha, bias)
    exact = equations_7_to_9(low.double(), phi.double(), alpha.double(), bias.double())
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).abs().max() < 1e-5
    grads = torch.autograd.grad(ours.residual.square().sum(), [low, phi])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]


def test_autocast_does_not_reach_the_coefficients() -> None:
    inputs = operands(4, 64, (10,), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = stream_mappings(*inputs)
    for a, b in zip(inside, stream_mappings(*inputs), strict=True):
        assert torch.equal(a, b)


def test_zero_streams_are_finite_in_value_and_gradient() -> None:
    inputs = operands(4, 8, (3,), torch.float32)
    inputs[0] = torch.zeros_like(inputs[0], requires_grad=True)
    mappings = stream_mappings(*inputs)
    grads = torch.autograd.grad(mappings.residual.square().sum() + mappings.pre.sum(), inputs)
    assert all(torch.isfinite(t).all() for t in [*mappings, *grads[1:]])


def test_strided_streams_and_empty_batches() -> None:
    inputs = operands(3, 8, (4, 5), torch.float32)
    strided = inputs[0].detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not strided.is_contiguous()
    for a, b in zip(stream_mappings(strided, *inputs[1:]), stream_mappings(*inputs), strict=True):
        assert torch.equal(a, b)
    empty = torch.zeros(0, 5, 3, 8, requires_grad=True)
    _, read, mappings = read_streams(empty, *inputs[1:])
    (read.sum() + mappings.residual.sum()).backward()
    assert mappings.residual.shape == (0, 5, 3, 3)
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape


def test_frozen_parameters_and_frozen_streams() -> None:
    inputs = operands(2, 8, (4,), torch.float64)
    inputs[1].requires_grad_(False)
    (grad,) = torch.autograd.grad(stream_mappings(*inputs).pre.sum(), inputs[0])
    assert grad.abs().sum() > 0
    inputs[0].requires_grad_(False)
    (grad,) = torch.autograd.grad(stream_mappings(*inputs).pre.sum(), inputs[3])
    assert grad.abs().sum() > 0


def test_shapes_that_do_not_fit_are_named() -> None:
    streams, phi, alpha, bias = operands(4, 8, (2,), torch.float32)
    with pytest.raises(ValueError, match=r"phi must be \[32, 24\] .* not \[24, 32\]"):
        stream_mappings(streams, phi.t(), alpha, bias)
    with pytest.raises(ValueError, match=r"alpha must be \[3\]"):
        stream_mappings(streams, phi, alpha[:2], bias)
    with pytest.raises(ValueError, match=r"bias must be \[24\]"):
        stream_mappings(streams, phi, alpha, bias[:-1])
    with pytest.raises(ValueError, match="num_iterations"):
        stream_mappings(streams, phi, alpha, bias, num_iterations=0)
