"""The operators of a memory as torch sees them: registration, transforms, export."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import randn
from memory_definitions import exact_gates, exact_write
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from mhc_lightning.kernels import backend, context_gates, gated_write

BATCH, LENGTH, N, WIDTH, TAPS, DILATION = 2, 5, 3, 4, 3, 2
STREAMS = (BATCH, LENGTH, N, WIDTH)
EPS = 1e-3


def gates(streams: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    passed, gate = context_gates(streams, key, weight, EPS)
    return gate + (passed * passed).sum(-1)


def exactly_gates(streams: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    return exact_gates(streams, key, weight, EPS) + (streams * streams).sum(-1)


def write(streams: Tensor, value: Tensor, gate: Tensor, taps: Tensor) -> Tensor:
    return gated_write(streams, value, gate, taps, DILATION)


def exactly_write(streams: Tensor, value: Tensor, gate: Tensor, taps: Tensor) -> Tensor:
    return exact_write(streams, value, gate, taps, DILATION)


def operands(name: str, *batch: int) -> list[Any]:
    shapes: dict[str, list[tuple[int, ...]]] = {
        "gates": [STREAMS, STREAMS, (N, WIDTH)],
        "write": [STREAMS, (BATCH, LENGTH, WIDTH), (BATCH, LENGTH, N), (TAPS, N, WIDTH)],
    }
    return [randn(*batch, *shape, dtype=torch.float64) for shape in shapes[name]]


FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "gates": (gates, exactly_gates),
    "write": (write, exactly_write),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_agree_with_the_equation(name: str) -> None:
    ours, exact = FUNCTIONS[name]
    given = operands(name)
    tangents = [torch.randn_like(t) for t in given]
    for a, b in zip(
        jvp(ours, tuple(given), tuple(tangents)),
        jvp(exact, tuple(given), tuple(tangents)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)

    def total(function: Callable) -> Callable:
        return lambda *t: function(*t).sin().sum()

    every = tuple(range(len(given)))
    several = operands(name, 3)
    for a, b in zip(
        vmap(grad(total(ours), every))(*several),
        vmap(grad(total(exact), every))(*several),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        hessian(total(ours), 1)(*given), hessian(total(exact), 1)(*given), rtol=1e-8, atol=1e-9
    )
    leaves = [t.requires_grad_() for t in operands(name)]
    result, expected = ours(*leaves), exact(*leaves)
    rows = torch.randn(2, *result.shape, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(result, leaves, rows, is_grads_batched=True),
        torch.autograd.grad(expected, leaves, rows, is_grads_batched=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def calls() -> dict[str, tuple[Any, tuple]]:
    ops = torch.ops.mhc_lightning
    x, key, weight = (t.float() for t in operands("gates"))
    flat = x.flatten(0, 1), key.flatten(0, 1), weight
    factors = [torch.rand(BATCH * LENGTH, N) for _ in range(4)]
    streams, value, gate, taps = (t.float() for t in operands("write"))
    learned = [t.clone().requires_grad_() for t in (streams, value, gate, taps)]
    of_gates = [t.clone().requires_grad_() for t in flat]
    return {
        "gates": (ops.context_gates, (*of_gates, EPS)),
        "gates_backward": (
            ops.context_gates_backward,
            (*flat, *factors[:3], flat[0], factors[3]),
        ),
        "write": (ops.gated_write, (*learned, DILATION)),
        "write_without_taps": (ops.gated_write, (*learned[:3], None, 1)),
        "write_backward": (ops.gated_write_backward, (streams, value, gate, taps, DILATION)),
    }


@pytest.mark.parametrize("kernels", ["torch", "triton", "compiled"])
@pytest.mark.parametrize("name", sorted(calls()))
def test_registration(name: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, kernels)
    operator, arguments = calls()[name]
    utils: tuple[str, ...] = ("test_schema", "test_faketensor")
    if kernels == "torch":
        utils = (*utils, "test_autograd_registration")
    torch.library.opcheck(operator.default, arguments, test_utils=utils)


def test_one_program_for_sequences_of_any_length() -> None:
    """Plain torch's pieces leave no trace in what is exported."""

    class Part(torch.nn.Module):
        def forward(self, streams: Tensor, key: Tensor, value: Tensor) -> Tensor:
            passed, gate = context_gates(streams, key, torch.ones(N, WIDTH), EPS)
            return gated_write(passed, value, gate, torch.ones(TAPS, N, WIDTH), DILATION)

    def given(length: int) -> tuple[Tensor, ...]:
        shape = (BATCH, length, N, WIDTH)
        return randn(*shape), randn(*shape), randn(BATCH, length, WIDTH)

    sizes = {1: torch.export.Dim("length", min=2, max=10_000)}
    program = torch.export.export(Part(), given(7), dynamic_shapes=(sizes, sizes, sizes))
    for length in (2, 12, 600):
        some = given(length)
        torch.testing.assert_close(program.module()(*some), Part()(*some))
