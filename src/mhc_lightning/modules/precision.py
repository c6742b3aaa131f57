"""Autocast's dtype, and modules that no cast takes below float32."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype on a tensor's device; None where it is off, as always on meta."""
    device = x.device.type
    enabled = not x.is_meta and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


class KeepsFloat32(nn.Module):
    """A module whose own tensors stay float32 under `.half()` and `.bfloat16()`.

    `.double()` makes these tensors float64. Moves between devices work as usual. Casts by precision
    plugins follow the same rule.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Cast tensors that are assigned, not copied, to float32 too."""
        for name in (*self._parameters, *self._buffers):
            tensor = state_dict.get(prefix + name)
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                state_dict[prefix + name] = tensor.float() if tensor.dtype.itemsize < 4 else tensor
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
