"""Chunked projection and cross-entropy against the two done separately."""

import pytest
import torch
import torch.nn.functional as F

from mhc_lightning.kernels import cross_entropy, linear_cross_entropy, token_losses


@pytest.mark.parametrize("chunk_logits", [1, 100, 10**9])
def test_value_and_gradients(chunk_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", chunk_logits)
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 31, (23,))
    ours = linear_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy(hidden @ weight.t(), targets)
    assert (ours - expected).abs() < 1e-12
    each = token_losses(hidden, weight, targets)
    assert (
        each - F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    ).abs().max() < 1e-12
    for a, b in zip(
        torch.autograd.grad(3 * ours, [hidden, weight]),
        torch.autograd.grad(3 * expected, [hidden, weight]),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-12


def test_float32_and_bfloat16() -> None:
    hidden = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(100, 32, requires_grad=True)
    targets = torch.randint(0, 100, (64,))
    expected = F.cross_entropy(hidden.double() @ weight.double().t(), targets)
    assert (linear_cross_entropy(hidden, weight, targets) - expected).abs() < 1e-5
    low = linear_cross_entropy(hidden.bfloat16(), weight, targets)
    assert low.dtype == torch.float32
    assert (low - expected).abs() < 0.05
    grads = torch.autograd.grad(low, [hidden, weight])
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]


def test_only_the_gradients_asked_for() -> None:
    hidden = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(5, 4)
    targets = torch.randint(0, 5, (6,))
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)
    (expected,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), targets), hidden)
    assert (grad - expected).abs().max() < 1e-6


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that any operation returns is larger than a chunk (or a gradient)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", 4000)
    hidden = torch.randn(1000, 8, requires_grad=True)
    weight = torch.randn(500, 8, requires_grad=True)
    with Watch():
        linear_cross_entropy(hidden, weight, torch.randint(0, 500, (1000,))).backward()
    assert largest == hidden.numel() == 8000
