"""The dtype that operators compute in, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any operand is float64, else float32: coefficients have at least float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is float64 already."""
    return tensor.to(compute_dtype(tensor))


def full_precision(streams: Tensor) -> AbstractContextManager:
    """Keep autocast away from the arithmetic of an operator."""
    # There is no autocast on meta.
    return nullcontext() if streams.is_meta else torch.autocast(streams.device.type, enabled=False)
