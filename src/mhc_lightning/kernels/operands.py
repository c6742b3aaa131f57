"""What the public functions check of their operands, and the dtype they compute in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mhc_lightning.errors import UserError


def check_shape(name: str, tensor: Tensor, shape: list[int], streams: Tensor) -> None:
    """Raise ValueError unless ``tensor`` has the shape that the streams ask for."""
    if list(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be {shape} for streams {list(streams.shape)}, not {list(tensor.shape)}"
        )


def check_iterations(num_iterations: int) -> None:
    """Raise ValueError unless ``num_iterations`` is at least 1."""
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, not {num_iterations}")


def check_values(hold: Tensor, message: str) -> None:
    """Raise UserError unless a boolean scalar is true.

    On CUDA nobody waits for it: the device stops where it is false. In compiled code too it is an
    assertion, of RuntimeError.
    """
    if hold.device.type not in ("cpu", "cuda", "meta"):  # which torch has an assertion for
        if not bool(hold):
            raise UserError(message)
        return
    try:
        torch._assert_async(hold, message)
    except RuntimeError as error:
        raise UserError(message) from error


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any operand is, float32 otherwise: coefficients are never of lower precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor.to(compute_dtype(tensor))


def full_precision(streams: Tensor) -> AbstractContextManager:
    """Keep autocast away from the arithmetic of an operator."""
    # There is no autocast on meta.
    return nullcontext() if streams.is_meta else torch.autocast(streams.device.type, enabled=False)


def empty(like: Tensor) -> Tensor:
    """What an operator returns in place of a result that was not asked for."""
    return like.new_empty(0)
