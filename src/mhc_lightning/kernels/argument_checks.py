"""Checks of the public functions' arguments."""

import torch
from torch import Tensor

from mhc_lightning.errors import UserError


def check_shape(name: str, tensor: Tensor, shape: list[int], streams: Tensor) -> None:
    """Raise ValueError unless `tensor` has the shape that the streams require."""
    if list(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be {shape} for streams {list(streams.shape)}, not {list(tensor.shape)}"
        )


def check_iterations(num_iterations: int) -> None:
    """Raise ValueError unless `num_iterations` is at least 1."""
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, not {num_iterations}")


def check_values(hold: Tensor, message: str) -> None:
    """Raise UserError unless a boolean scalar is true.

    On CUDA the host does not wait for the value: the device stops if the value is false. In
    compiled code the check is an assertion as well, which raises RuntimeError.
    """
    if hold.device.type not in ("cpu", "cuda", "meta"):  # torch has an assertion for these
        if not bool(hold):
            raise UserError(message)
        return
    try:
        torch._assert_async(hold, message)
    except RuntimeError as error:
        raise UserError(message) from error
