"""The last few positions of each row of a batch that is continued again and again."""

import torch
from torch import Tensor


class RecentWindow:
    """The last W positions of each row; rows may have different lengths.

    `extend` gives the window with new positions behind it. `advance` then says how many of these
    count in each row; the others are padding.

    Args:
        values: [B, W, ...], what stands before the first position.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._extended: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """The window and S new positions [B, S, ...] -> [B, W + S, ...]."""
        self._extended = torch.cat([self.values, new.to(self.values.dtype)], 1)
        return self._extended

    def advance(self, counts: Tensor, most: int) -> None:
        """Count the first `counts` [B] of the new positions."""
        assert self._extended is not None
        width = self.values.shape[1]
        places = counts[:, None] + torch.arange(width, device=counts.device)  # [B, W]
        rows = torch.arange(len(counts), device=counts.device)[:, None]
        self.values, self._extended = self._extended[rows, places], None

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows [K] only, in their order; a row may be kept several times."""
        self.values = self.values[rows]
