"""Chunked projection and cross-entropy against the two done separately."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from mhc_lightning.errors import UserError
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


@pytest.mark.parametrize("chunk_logits", [100, 10**9])
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 30, 500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ignored_targets(
    dtype: torch.dtype, ignore_index: int, chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean is over the others; ignored tokens get no gradient and add none, not even NaN."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", chunk_logits)
    hidden = torch.randn(23, 8).to(dtype)
    weight = torch.randn(31, 8).to(dtype).requires_grad_()
    targets = torch.randint(0, 31, (23,))
    targets[torch.randperm(23)[:11]] = ignore_index
    left = targets != ignore_index
    assert 0 < left.sum() < 23
    clean = hidden.double().clone().requires_grad_()
    wide = weight.detach().double().clone().requires_grad_()
    expected = F.cross_entropy(clean @ wide.t(), targets, ignore_index=ignore_index)
    wanted = torch.autograd.grad(3 * expected, [clean, wide])
    hidden[~left] = torch.nan
    hidden.requires_grad_()
    ours = linear_cross_entropy(hidden, weight, targets, ignore_index)
    found = torch.autograd.grad(3 * ours, [hidden, weight])
    each = token_losses(hidden, weight, targets, ignore_index)
    near = 20 * torch.finfo(dtype).eps
    assert ours.item() == pytest.approx(expected.item(), rel=near)
    assert each[~left].count_nonzero() == 0
    assert each.sum().item() == pytest.approx(expected.item() * int(left.sum()), rel=near)
    assert found[0][~left].count_nonzero() == 0
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= near * b.norm()


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_without_any_valid_target_loss_and_gradients_are_zero(tokens: int) -> None:
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    targets = torch.full((tokens,), -100)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss == 0
    assert token_losses(hidden, weight, targets).tolist() == [0] * tokens
    for grad, of in zip(torch.autograd.grad(loss, [hidden, weight]), (hidden, weight), strict=True):
        assert grad.shape == of.shape
        assert grad.count_nonzero() == 0


@pytest.mark.parametrize("wrong", [-1, -99, 5, 2**40])
@pytest.mark.parametrize("loss", [linear_cross_entropy, token_losses])
def test_a_target_that_is_no_class_is_refused(loss, wrong: int) -> None:
    hidden, weight = torch.randn(6, 4), torch.randn(5, 4)
    targets = torch.tensor([0, 4, -100, wrong, 1, 2])
    with pytest.raises(UserError, match=rf"from 0 to 4, or -100 for none, not {wrong}$"):
        loss(hidden, weight, targets)
    with pytest.raises(UserError, match=r"or 3 for none, not -100"):
        loss(hidden, weight, targets, 3)
    loss(hidden, weight, torch.tensor([0, 4, -100, 3, 1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_rounded_after_the_loss_is_scaled(dtype: torch.dtype) -> None:
    """Of thousands of tokens, times constants that are no powers of two, against float64."""
    tokens, classes = 16384, 1000
    hidden, weight = torch.randn(tokens, 16).to(dtype), (0.05 * torch.randn(classes, 16)).to(dtype)
    targets = torch.randint(0, classes, (tokens,)) % 400  # the frequent ones sum up
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].t(), targets), wide)
    for scale in (65536.0, 65536 / 3):
        ours = [x.clone().requires_grad_() for x in (hidden, weight)]
        found = torch.autograd.grad(scale * linear_cross_entropy(ours[0], ours[1], targets), ours)
        for a, b in zip(found, expected, strict=True):
            assert (a.double() / scale - b).norm() <= max(torch.finfo(dtype).eps, 1e-6) * b.norm()


def test_sums_over_tokens_stay_in_the_range_of_float16() -> None:
    hidden = torch.full((4096, 2), 60.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(3, 2, dtype=torch.float16, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.long))
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.tolist() == [[-40, -40], [20, 20], [20, 20]]


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)])
def test_second_derivatives_are_refused(trained: tuple[int, ...]) -> None:
    """Also where nothing but the gradient itself depends on the parameters."""
    tensors = [torch.randn(6, 4), torch.randn(5, 4)]
    ours = [tensors[k].requires_grad_() for k in trained]
    loss = linear_cross_entropy(tensors[0], tensors[1], torch.randint(0, 5, (6,)))
    grads = torch.autograd.grad(loss, ours, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.stack([grad.square().sum() for grad in grads]).sum().backward()


def test_compiled_whole_and_under_fake_tensors() -> None:
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    hidden = torch.randn(9, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 4, -100, 0, -100, 1])
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), [hidden, weight])
    found = torch.autograd.grad(compiled(hidden, weight, targets), [hidden, weight])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-6
    with pytest.raises(RuntimeError, match="from 0 to 4"):
        compiled(hidden, weight, targets + 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.shape == ()
