"""The chip that a kernel will run on, where block sizes or precisions depend on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """A kind of chip.

    Attributes:
        backend: `"cuda"` or `"hip"`, as Triton names them.
        capability: NVIDIA's compute capability times ten; 0 on AMD's chips.
    """

    backend: str
    capability: int


_HOPPER = Target("cuda", 90)
_assumed: Target | None = None


def target_of(tensor: Tensor) -> Target:
    """The chip that holds a tensor; for a CPU tensor, the chip of `assume`, by default Hopper."""
    if not tensor.is_cuda:
        return _assumed or _HOPPER
    if torch.version.hip:
        return Target("hip", 0)
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return Target("cuda", 10 * major + minor)


@contextmanager
def assume(target: Target) -> Iterator[None]:
    """Within, launch with CPU tensors as for `target`: to compile for the chip, not to run.

    Args:
        target: The chip.
    """
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before
