"""How the kernels' results are compared with float64."""

import torch
from torch import Tensor

# Relative to the largest entry: 16-bit results carry their own rounding, float32 ones little.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers, drawn in float64 so that all dtypes see the same ones."""
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def assert_close_to_float64(
    actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Hold ``max|a - b| / max|b|`` to the limit of ``dtype``, at first that of ``actual``."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    limit = LIMITS[dtype or actual.dtype]
    error = (actual.double() - expected).abs().max()
    largest = expected.abs().max().clamp(min=1e-30)
    assert error / largest <= limit, f"{error / largest:.2e} exceeds {limit:.0e}"
