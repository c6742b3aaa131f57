"""Random initial values that are the same however a network is spread over devices."""

import math

import torch
from torch import Tensor

_GROUP = 2**16  # values that one generator draws, unless a single row has more


class NormalMatrices:
    """Fills matrices one after the other with normal values.

    Rows (along the first dimension) are drawn in groups, each from a generator of its own, on the
    CPU and in float32. So a device that holds some rows of a matrix draws those alone, and they
    are the rows that a device with the whole matrix has.

    Args:
        seed: At least 0 and below 2**32; group k of the network is drawn with seed + k.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fill(self, part: Tensor, first_row: int, shape: torch.Size, std: float) -> None:
        """Fill ``part``, which holds rows from ``first_row`` on of a matrix of ``shape``.

        A part on ``meta`` is left alone, and counts as filled.
        """
        rows, width = shape[0], math.prod(shape[1:])
        per_group = max(1, _GROUP // max(1, width))
        first_seed = self._seed
        self._seed += math.ceil(rows / per_group)
        if part.is_meta or part.numel() == 0:
            return
        end_row = first_row + len(part)
        for group in range(first_row // per_group, math.ceil(end_row / per_group)):
            start = group * per_group
            end = min(start + per_group, rows)
            # torch's generator reads 32 bits of a seed.
            generator = torch.Generator("cpu").manual_seed((first_seed + group) % 2**32)
            values = torch.empty(end - start, *shape[1:], dtype=torch.float32, device="cpu")
            values.normal_(std=std, generator=generator)
            low, high = max(start, first_row), min(end, end_row)
            part[low - first_row : high - first_row].copy_(values[low - start : high - start])
