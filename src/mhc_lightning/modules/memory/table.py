"""A table of rows that n-grams name by their hashes.

Shapes: H heads, D width of a row.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_lightning.modules.memory.hashing import NgramLayout
from mhc_lightning.modules.precision import KeepsFloat32

INIT_STD = 0.02  # of a table's rows


class RowStore(Protocol):
    """Where the rows of a table are, and what becomes of their gradient."""

    def look_up(self, rows: Tensor) -> Tensor:
        """Rows, int64 [...] -> their values [..., D]; the gradient goes where it belongs."""
        ...


class NgramTable(KeepsFloat32):
    """The rows of all heads of one layout, one after another, in float32.

    By itself a table is an ordinary embedding with an ordinary gradient. `store` replaces the
    look-up: rows on other devices, gradients of the rows that were touched alone.

    Args:
        layout: The sizes.
        width: D.

    Attributes:
        weight: [H · rows_per_head, D].
        store: Where rows come from; None for `weight` itself.
    """

    matrices = ("weight",)  # drawn in groups of rows: the same values on any number of devices
    init_std = INIT_STD

    def __init__(self, layout: NgramLayout, width: int) -> None:
        super().__init__()
        self.width = width
        self.rows_per_head = layout.rows_per_head
        self.num_rows = layout.heads * layout.rows_per_head
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(self.num_rows, width, dtype=dtype))
        self.store: RowStore | None = None

    def forward(self, rows: Tensor) -> Tensor:
        """Rows, int64 [..., H] -> values [..., H, D]."""
        if self.store is not None:
            return self.store.look_up(rows)
        return F.embedding(rows, self.weight)

    def extra_repr(self) -> str:
        """The sizes, for a printed model."""
        return f"rows={self.num_rows}, width={self.width}"
