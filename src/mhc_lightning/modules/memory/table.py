"""A table of rows that n-grams name by their hashes.

Shapes: H heads, D width of a row.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_lightning.modules.memory.layout import NgramLayout
from mhc_lightning.modules.memory.row_store import RowStore
from mhc_lightning.modules.precision import KeepsFloat32

INIT_STD = 0.02  # of a table's rows


class _Beside(torch.autograd.Function):
    """The first tensor; for autograd it depends on the second one too, with no gradient."""

    generate_vmap_rule = True  # with `setup_context` and `jvp` it goes through torch.func

    @staticmethod
    def forward(values, beside):  # type: ignore[no-untyped-def]
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None

    @staticmethod
    def jvp(ctx, values, beside):  # type: ignore[no-untyped-def]
        return values.view_as(values)


class NgramTable(KeepsFloat32):
    """The rows of all heads of one layout, one after another, in float32.

    By itself a table is an ordinary embedding with an ordinary gradient. A `store` replaces the
    look-up: gradients of the touched rows alone, rows on other devices.

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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows; a Transformer draws them in its own way."""
        with torch.no_grad():
            self.weight.normal_(std=self.init_std)

    def forward(self, rows: Tensor, beside: Tensor | None = None) -> Tensor:
        """Rows, int64 [..., H] -> values [..., H, D].

        Args:
            rows: The numbers of the rows.
            beside: A tensor that the values are used with. A backward pass for its gradient alone
                computes that of the values too. Pipeline schedules that split the backward pass
                need it where the values meet the streams more than once.
        """
        if self.store is None or self.store.weight is not self.weight:  # another one is lent
            values = F.embedding(rows, self.weight)
        else:
            values = self.store.look_up(rows)
        return values if beside is None else _Beside.apply(values, beside)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the rows, unless their store keeps them where they are."""
        keeps = self.store is not None and self.store.keeps_place
        return self if keeps else super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """The sizes, for a printed model."""
        return f"rows={self.num_rows}, width={self.width}"
