"""Ways in which a tensor can lie in memory."""

import torch
from torch import Tensor

LAYOUTS = ["contiguous", "axes swapped", "every other", "shifted", "copies", "constant"]


def laid_out(layout: str, tensor: Tensor) -> Tensor:
    """A tensor of the same shape in the layout: the same values, or repeated ones (stride 0).

    Args:
        layout: One of `LAYOUTS`.
        tensor: [tokens, ..., C], contiguous.
    """
    if layout == "axes swapped":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every other":
        return torch.stack([tensor, tensor + 1], dim=-1).flatten(-2)[..., ::2]
    if layout == "shifted":
        return torch.nn.functional.pad(tensor, (1, 0))[..., 1:]
    if layout == "copies":
        return tensor.narrow(-2, 0, min(1, tensor.shape[-2])).expand_as(tensor)
    if layout == "constant":
        return torch.ones((), dtype=tensor.dtype).expand(tensor.shape)
    return tensor
