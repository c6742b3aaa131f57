"""Products of runs of rows, by every path that there is for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from mhc_lightning.kernels.grouped_product import grouped_product, grouped_product_op


def operands(width: int, dtype: torch.dtype, *lengths: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.randn(sum(lengths), 8, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.randn(len(lengths), 8, width, dtype=torch.float64).to(dtype).requires_grad_()
    return rows, weights, torch.tensor(lengths).cumsum(0).int()


@pytest.mark.parametrize("product", [grouped_product, grouped_product_op])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 5])
@pytest.mark.parametrize("lengths", [(3, 0, 4, 1), (0, 0), (6,)])
def test_each_run_has_its_matrix(
    product: Callable[..., Tensor], dtype: torch.dtype, width: int, lengths: tuple[int, ...]
) -> None:
    rows, weights, ends = operands(width, dtype, *lengths)
    which = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    exact = [x.detach().double().requires_grad_() for x in (rows, weights)]
    expected = torch.einsum("ri,rio->ro", exact[0], exact[1][which])
    ours = product(rows, weights, ends)
    assert ours.dtype == dtype
    grad = torch.randn_like(expected).to(dtype)
    pairs = [
        (ours, expected),
        *zip(
            torch.autograd.grad(ours, [rows, weights], grad),
            torch.autograd.grad(expected, exact, grad.double()),
            strict=True,
        ),
    ]
    for actual, wanted in pairs:
        assert actual.shape == wanted.shape
        assert torch.allclose(actual.double(), wanted, rtol=0, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [16, 5])
def test_transforms(dtype: torch.dtype, width: int) -> None:
    """Batches of runs that end in different places, per-example gradients and tangents."""
    lengths = [(3, 0, 4, 1), (0, 0, 8, 0), (2, 2, 2, 2)]
    examples = [operands(width, dtype, *each) for each in lengths]
    batched = [torch.stack(tensors).detach() for tensors in zip(*examples, strict=True)]
    tolerance: Any = {"rtol": 0, "atol": 64 * torch.finfo(dtype).eps}
    expected = [grouped_product(*each) for each in examples]
    ours = vmap(grouped_product)(*batched)
    torch.testing.assert_close(ours, torch.stack(expected), **tolerance)
    weigh = torch.randn_like(expected[0])
    gradients = vmap(grad(lambda *given: (grouped_product(*given) * weigh).sum(), (0, 1)))(*batched)
    for k, (rows, weights, ends) in enumerate(examples):
        wanted = torch.autograd.grad(expected[k], [rows, weights], weigh)
        for actual, right in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(actual[k], right, **tolerance)
        tangents = torch.randn_like(rows), torch.randn_like(weights)
        given = rows.detach(), weights.detach()
        moving = jvp(lambda r, w, ends=ends: grouped_product(r, w, ends), given, tangents)[1]
        slope = sum((t * g).sum() for t, g in zip(tangents, wanted, strict=True))
        torch.testing.assert_close((moving * weigh).sum(), slope, **{**tolerance, "atol": 1e-3})


def test_the_operator_is_one() -> None:
    torch.library.opcheck(grouped_product_op, operands(5, torch.float32, 2, 0, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 5])
def test_shapes_on_meta(dtype: torch.dtype, width: int) -> None:
    rows, weights, ends = (x.detach().to("meta") for x in operands(width, dtype, 2, 0, 3))
    out = grouped_product(rows.requires_grad_(), weights, ends)
    assert out.shape == (5, width) and out.dtype == dtype
    assert torch.autograd.grad((out * out).sum(), rows)[0].shape == rows.shape
