"""The norm of gradients of every size and precision, against float64."""

import math

import pytest
import torch
from torch import nn

from mhc_lightning.strategies.gradient_norm import global_norm


def parameters_with(*grads: torch.Tensor) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    return parameters


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-22, 1e-16, 1.0, 1e18, 1e19, 1e30, 1e37])
@pytest.mark.parametrize(
    "dtypes", [[torch.float32], [torch.bfloat16], [torch.bfloat16, torch.float32]]
)
def test_any_size_has_its_norm(size: float, dtypes: list[torch.dtype]) -> None:
    grads = [(size * torch.rand(700, dtype=torch.float64)).to(dtype) for dtype in dtypes]
    norm = global_norm(parameters_with(*grads))
    assert norm.dtype == torch.float32
    expected = torch.cat([grad.double() for grad in grads]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5 if size > 1e-37 else 1e-2)


def test_half_precision_is_summed_in_float32() -> None:
    """Its own sum would be infinite for float16 and have three digits for bfloat16."""
    for dtype, value in ((torch.float16, 3e4), (torch.bfloat16, 1.0)):
        grad = torch.full((1003,), value, dtype=dtype)
        norm = global_norm(parameters_with(grad))
        assert norm.item() == pytest.approx(grad.double().norm().item(), rel=1e-6)


def test_what_has_no_norm_says_so() -> None:
    nothing = torch.zeros(3)
    assert global_norm(parameters_with(nothing, torch.zeros(0))).item() == 0
    assert global_norm(parameters_with(nothing, torch.tensor([math.inf]))).item() == math.inf
    assert math.isnan(global_norm(parameters_with(nothing, torch.tensor([math.nan]))).item())
    too_large = torch.full((4,), 3e38)
    assert global_norm(parameters_with(too_large)).item() == math.inf
    assert global_norm(parameters_with(too_large.double())).item() == pytest.approx(6e38)
