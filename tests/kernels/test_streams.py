"""Aggregate and merge against einsum in float64, and a whole connection against plain autograd."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mhc_lightning.kernels import aggregate_streams, merge_streams, read_streams, stream_mappings

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def operands(n: int, width: int, leading: tuple[int, ...]) -> tuple[Tensor, ...]:
    shapes = [(n, width), (width,), (n, n), (n,), (n,)]
    return tuple(
        torch.randn(*leading, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes
    )


@given(n=st.integers(1, 8), width=st.integers(1, 33), seed=st.integers(0, 2**31))
def test_against_einsum(n: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    streams, output, residual, post, pre = operands(n, width, (2, 3))
    read = aggregate_streams(streams, pre)
    merged = merge_streams(streams, output, residual, post)
    expected_read = torch.einsum("bsn,bsnc->bsc", pre, streams)
    expected_merged = torch.einsum("bsij,bsjc->bsic", residual, streams) + torch.einsum(
        "bsn,bsc->bsnc", post, output
    )
    assert (read - expected_read).abs().max() < 1e-12
    assert (merged - expected_merged).abs().max() < 1e-12
    inputs = [streams, output, residual, post, pre]
    weights = torch.randn_like(read), torch.randn_like(merged)
    ours = torch.autograd.grad([read, merged], inputs, weights)
    expected = torch.autograd.grad([expected_read, expected_merged], inputs, weights)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 1e-11


def test_orientation_is_the_papers() -> None:
    """A one in row i, column j sends stream j to stream i."""
    streams = torch.arange(3.0)[:, None].expand(3, 5).clone()
    residual = torch.zeros(3, 3)
    residual[0, 2] = 1
    merged = merge_streams(streams, torch.zeros(5), residual, torch.zeros(3))
    assert torch.equal(merged[0], streams[2])
    assert merged[1:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_streams_keep_float32_coefficients(dtype: torch.dtype) -> None:
    streams, output, residual, post, pre = (t.detach() for t in operands(4, 64, (50,)))
    low_streams = streams.to(dtype).requires_grad_()
    low_output = output.to(dtype).requires_grad_()
    coefficients = [t.float().requires_grad_() for t in (residual, post, pre)]
    merged = merge_streams(low_streams, low_output, *coefficients[:2])
    read = aggregate_streams(low_streams, coefficients[2])
    assert merged.dtype == read.dtype == dtype
    exact = merge_streams(
        low_streams.double(), low_output.double(), *(c.double() for c in coefficients[:2])
    )
    # One rounding of the exact result: the matrices themselves were not rounded.
    unit = torch.finfo(dtype).eps / 2
    assert ((merged.double() - exact).abs() <= 1.01 * unit * exact.abs() + 1e-6).all()
    grads = torch.autograd.grad(
        merged.float().square().sum() + read.float().sum(), [low_streams, low_output, *coefficients]
    )
    assert [g.dtype for g in grads] == [dtype, dtype] + 3 * [torch.float32]


def test_expanded_and_strided_operands() -> None:
    copies = torch.randn(2, 3, 1, 8).expand(2, 3, 4, 8)
    residual = torch.rand(4, 4).expand(2, 3, 4, 4)
    post = torch.rand(4, 3, 2).permute(2, 1, 0)
    output = torch.randn(2, 3, 8)
    merged = merge_streams(copies, output, residual, post)
    expected = merge_streams(copies.contiguous(), output, residual.contiguous(), post.contiguous())
    assert torch.equal(merged, expected)
    assert merge_streams(
        torch.zeros(0, 4, 8), torch.zeros(0, 8), torch.zeros(0, 4, 4), torch.zeros(0, 4)
    ).shape == (0, 4, 8)


def test_shapes_that_do_not_fit_are_named() -> None:
    streams, output, residual, post, pre = operands(4, 8, (2,))
    with pytest.raises(ValueError, match=r"pre must be \[2, 4\]"):
        aggregate_streams(streams, pre[:, :3])
    with pytest.raises(ValueError, match=r"output must be \[2, 8\]"):
        merge_streams(streams, output[:, :4], residual, post)
    with pytest.raises(ValueError, match=r"residual must be \[2, 4, 4\]"):
        merge_streams(streams, output, residual[..., :3], post)
    with pytest.raises(ValueError, match=r"post must be \[2, 4\]"):
        merge_streams(streams, output, residual, post[:1])


def parameters(n: int, width: int) -> list[Any]:
    coefficients = n * n + 2 * n
    return [
        torch.randn(n * width, coefficients, dtype=torch.float64, requires_grad=True),
        torch.rand(3, dtype=torch.float64, requires_grad=True),
        torch.randn(coefficients, dtype=torch.float64, requires_grad=True),
    ]


def connect(streams: Tensor, *parameters: Any) -> Tensor:
    kept, read, mappings = read_streams(streams, *parameters)
    return merge_streams(kept, read.sin(), mappings.residual, mappings.post)


def connect_in_parts(streams: Tensor, *parameters: Any) -> Tensor:
    mappings = stream_mappings(streams, *parameters)
    read = aggregate_streams(streams, mappings.pre)
    return merge_streams(streams, read.sin(), mappings.residual, mappings.post)


def test_reading_in_one_step_equals_its_parts() -> None:
    streams = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    inputs = [streams, *parameters(4, 6)]
    ours, parts = connect(*inputs), connect_in_parts(*inputs)
    assert (ours - parts).abs().max() < 1e-13
    weights = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, weights),
        torch.autograd.grad(parts, inputs, weights),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-12


def test_gradcheck_of_a_connection() -> None:
    streams = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(connect, (streams, *parameters(3, 4)))


@pytest.mark.parametrize("used", ["kept", "read", "pre", "residual"])
def test_each_output_alone_has_the_right_gradient(used: str) -> None:
    streams = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)

    def one_output(streams: Tensor, *rest: Any) -> Tensor:
        kept, read, mappings = read_streams(streams, *rest)
        return {"kept": kept, "read": read, **mappings._asdict()}[used]

    assert torch.autograd.gradcheck(one_output, (streams, *parameters(3, 4)))


def test_streams_used_twice() -> None:
    """Somebody else may use the streams beside the connection."""
    streams = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    rest = parameters(3, 4)
    assert torch.autograd.gradcheck(
        lambda s: connect(s, *rest) * s + connect(s * s, *rest), (streams,)
    )


def test_a_connection_compiles_without_a_break() -> None:
    streams = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = [streams, *parameters(3, 4)]
    compiled = torch.compile(connect, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*inputs), connect(*inputs)
    assert (ours - expected).abs().max() < 1e-13
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-12
