"""Which precision computations run in, and what no cast may take below float32."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast takes operands on this device to; None where it is off, as always on meta."""
    device = x.device.type
    enabled = not x.is_meta and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


class KeepsFloat32(nn.Module):
    """A module whose own tensors stay float32 under ``.half()`` and ``.bfloat16()``.

    ``.double()`` makes them float64, and devices change as usual. Precision plugins cast through
    the same door.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)
