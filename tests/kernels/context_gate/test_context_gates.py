"""Context gates and their gradients, by both backends, against their equation in float64."""

from typing import Any

import pytest
import torch
from accuracy import assert_close_to_float64, randn
from balanced import balanced
from layouts import LAYOUTS, laid_out
from memory_definitions import exact_gates
from torch import Tensor

from mhc_lightning.kernels import context_gates
from mhc_lightning.kernels.context_gate.operands import GateOperands
from mhc_lightning.kernels.context_gate.triton import gate_backward, gate_forward
from mhc_lightning.kernels.triton_support.block_sizes import Config, choose

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
run: Any = context_gates  # with lists of tensors
run_exactly: Any = exact_gates


def like(streams: Tensor) -> Tensor:
    """Keys whose scores are not near zero, where the gates' slope has a pole."""
    return streams.detach().float() + randn(*streams.shape, scale=0.5)


@balanced(
    20,
    backend=["torch", "triton"],
    tokens=[0, 1, 2, 5],
    n=range(1, 9),
    # Below, at and beyond the width that a warp takes in one step: 128 of float32, 256 of 16 bits.
    width=[2, 3, 20, 65, 128, 264],
    dtype=DTYPES,
    key_dtype=DTYPES,
    layout=LAYOUTS,
    key_layout=LAYOUTS,
    kept=[True, False],
)
def test_against_float64(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    tokens: int,
    n: int,
    width: int,
    dtype: torch.dtype,
    key_dtype: torch.dtype,
    layout: str,
    key_layout: str,
    kept: bool,
) -> None:
    monkeypatch.setenv("MHC_LIGHTNING_KERNELS", backend)
    streams = laid_out(layout, randn(tokens, n, width, dtype=dtype))
    key = laid_out(key_layout, like(streams).to(key_dtype))
    leaves: list[Any] = [t.requires_grad_() for t in (streams, key, 1 + randn(n, width, scale=0.2))]
    doubles: list[Any] = [t.detach().double().requires_grad_() for t in leaves]
    passed, gates = run(*leaves, eps=EPS)
    exact = run_exactly(*doubles, eps=EPS)
    assert gates.dtype == torch.float32
    assert passed.data_ptr() == streams.data_ptr()
    assert_close_to_float64(gates, exact.detach())
    weights = torch.randn_like(exact)
    ours, theirs = (gates * weights.float()).sum(), (exact * weights).sum()
    if kept:
        more = torch.randn_like(doubles[0])
        ours, theirs = ours + (passed.double() * more).sum(), theirs + (doubles[0] * more).sum()
    grads = torch.autograd.grad(ours, leaves)
    assert [g.dtype for g in grads] == [dtype, key_dtype, torch.float32]
    for a, b in zip(grads, torch.autograd.grad(theirs, doubles), strict=True):
        assert_close_to_float64(a, b)


@pytest.mark.parametrize("config", [(8, 64, 4, 1), (64, 32, 4, 2)])
def test_every_cut_into_programs_gives_the_same(config: tuple[int, int, int, int]) -> None:
    tokens, n, width = 21, 3, 72
    streams, key, weight = randn(tokens, n, width), randn(tokens, n, width), randn(n, width)
    kept, gate_grad = randn(tokens, n, width), randn(tokens, n)
    operands = GateOperands(streams, key, weight)
    default = gate_forward(operands, EPS)
    before = gate_backward(operands, *default[1:], kept, gate_grad)
    with choose("context_gate_forward", Config(*config)):
        results = gate_forward(operands, EPS)
    with choose("context_gate_backward", Config(*config)):
        after = gate_backward(operands, *default[1:], kept, gate_grad)
    for a, b in zip((*results, *after), (*default, *before), strict=True):
        assert_close_to_float64(a, b.double())


def test_gradients_in_float64_and_of_a_key_that_is_zero(cpu_kernels: str) -> None:
    streams, key, weight = (
        randn(*shape, dtype=torch.float64) for shape in [(4, 3, 6)] * 2 + [(3, 6)]
    )
    leaves: list[Any] = [t.requires_grad_() for t in (streams, key, weight)]
    assert torch.autograd.gradcheck(lambda *t: run(*t, eps=EPS), leaves)
    gates = context_gates(streams.detach(), torch.zeros_like(key).requires_grad_(), weight, 1e-20)[
        1
    ]
    assert torch.equal(gates, torch.full_like(gates, 0.5))
    grads = torch.autograd.grad(gates.sum(), weight)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", ["torch", "triton", "compiled"])
def test_streams_that_go_on_without_their_gates(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MHC_LIGHTNING_KERNELS", backend)
    streams, key = (randn(2, 5, 3, 8).requires_grad_() for _ in range(2))
    passed, _ = context_gates(streams, key, torch.ones(3, 8), EPS)
    ours = torch.autograd.grad((passed * passed).sum(), [streams, key], allow_unused=True)
    assert torch.equal(ours[0], 2 * streams) and ours[1] is None


def test_many_tokens_are_cut_into_pieces_with_the_same_result(cpu_kernels: str) -> None:
    """More than one piece, the last one shorter."""
    tokens, n, width = 700, 4, 256
    streams = randn(tokens, n, width)
    operands = streams, like(streams), 1 + randn(n, width, scale=0.2)
    leaves: list[Any] = [t.requires_grad_() for t in operands]
    doubles: list[Any] = [t.detach().double().requires_grad_() for t in leaves]
    weights = torch.randn(tokens, n, dtype=torch.float64)
    passed, gates = run(*leaves, eps=EPS)
    ours = torch.autograd.grad((gates * weights.float()).sum() + passed.sum(), leaves)
    exact = (run_exactly(*doubles, eps=EPS) * weights).sum() + doubles[0].sum()
    for a, b in zip(ours, torch.autograd.grad(exact, doubles), strict=True):
        assert_close_to_float64(a, b)


def test_shapes_that_do_not_fit_are_named() -> None:
    streams = torch.zeros(2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"key must be \[2, 3, 4, 8\]"):
        context_gates(streams, streams[..., :4], torch.ones(4, 8), EPS)
    with pytest.raises(ValueError, match=r"weight must be \[4, 8\]"):
        context_gates(streams, streams, torch.ones(8), EPS)
