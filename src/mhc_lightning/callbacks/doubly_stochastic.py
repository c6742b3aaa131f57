"""How far residual mappings are from doubly stochastic."""

import torch
from torch import Tensor


def sum_residuals(residual: Tensor) -> Tensor:
    """The largest |row sum − 1| and |column sum − 1| over all tokens: [2]."""
    matrices = residual.to(torch.promote_types(residual.dtype, torch.float32))
    return torch.stack([(matrices.sum(axis) - 1).abs().amax() for axis in (-1, -2)])
