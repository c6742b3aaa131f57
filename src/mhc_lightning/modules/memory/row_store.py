"""The rows of a table while it is trained: how they are looked up, and the gradient they get.

A *row gradient* is the gradient of some rows of a table [R, D]: a sparse COO tensor of torch, of
the table's shape, with one sparse dimension (the rows) and values [U, D]. It is the table's `grad`.
Memory and work for it grow with the rows that were looked up, not with the table.

Shapes: R rows of the table, D their width, U rows of a gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_lightning.kernels.transforms import transforming
from mhc_lightning.modules.initialisation import held_rows

_STORE = "row_store"  # the attribute of a parameter that has one


class RowStore:
    """The rows of a table that this process holds whole, and that it alone trains.

    Subclasses look rows up elsewhere, or combine gradients over processes. In each optimizer step:

    1. Backward passes hand row gradients to the weight; the store takes them from `grad`.
    2. `finish` adds them up, over processes too. The weight's `grad` is then the coalesced row
       gradient of the rows that this process updates, the mean over the shares of the batch.
       Clipping and callbacks work on it.
    3. The optimizer hands `apply` the update of these rows. A store may leave it to another thread
       for a while: `settle` waits for it.
    4. `clear` drops everything, as the optimizer's `zero_grad` does.

    A copy of a table (`deepcopy`, pickle) has no store.

    Args:
        weight: The table [R, D], or a DTensor that is sharded by rows.

    Attributes:
        weight: The table.
        keeps_place: True if the table stays where it is, whatever its module is moved to.
    """

    keeps_place = False

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._parts: list[Tensor] = []
        self._finished = False
        self._hook = weight.register_post_accumulate_grad_hook(self._take)
        setattr(weight, _STORE, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def remove(self) -> None:
        """Leave the table; its gradient is an ordinary one again."""
        self.clear()
        self._hook.remove()
        if row_store_of(self.weight) is self:
            delattr(self.weight, _STORE)

    def fetch_ahead(self, rows: Tensor) -> None:
        """Begin to fetch rows that the next `look_up` asks for, where they are not at hand."""

    def prefetch(self, rows: Tensor, before_update: bool) -> None:
        """Begin to fetch rows of the micro-batch that follows the present one, likewise.

        Args:
            rows: Those that its `fetch_ahead` will name.
            before_update: True if the present micro-batch is the last one of its optimizer step.
        """

    def look_up(self, rows: Tensor) -> Tensor:
        """Rows, int64 [...] -> their values [..., D], in the table's dtype.

        The gradient is a row gradient, but in transforms of `torch.func`, in compiled and in
        exported code, where it is dense.
        """
        plain = transforming() or torch.compiler.is_compiling()
        return F.embedding(rows, self.weight, sparse=not plain)

    def finish(self) -> None:
        """Add up the row gradients since `clear`; every process that shares the table calls this.

        A second call changes nothing.
        """
        if self._finished:
            return
        self.settle()
        self._finished = True
        grad = self.weight.grad
        parts = self._parts if grad is None else [*self._parts, grad]
        self._parts = []
        with torch.no_grad():
            rows, values = self.combine(*self._sum(parts))
            self.weight.grad = row_gradient(self.weight, rows, values)

    def combine(self, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the rows that this process updates, from that of its own share.

        Args:
            rows: int64 [U], ascending.
            values: [U, D].

        Returns:
            The same for the rows that this process updates, the mean over the shares of the batch.
        """
        return rows, values

    def norm(self, dtype: torch.dtype) -> Tensor:
        """The Euclidean norm of the whole table's gradient, a scalar, alike on every process."""
        grad = self.weight.grad
        assert grad is not None
        return torch.linalg.vector_norm(grad._values(), dtype=dtype)

    def apply(self, update: Callable[[], object]) -> None:
        """Run the update of this process's rows; every process that shares the table calls this."""
        update()

    def settle(self) -> None:
        """Wait until the rows, and the optimizer's state of them, are those of the last step."""

    def held(self) -> tuple[Tensor, int]:
        """The rows that this process updates [rows, D], in place, and the first one's number."""
        return held_rows(self.weight.detach())

    def clear(self) -> None:
        """Drop the gradient."""
        self._parts.clear()
        self._finished = False
        self.weight.grad = None

    def _take(self, weight: Tensor) -> None:
        # torch would concatenate gradients at every backward pass.
        assert weight.grad is not None
        self._parts.append(weight.grad)
        self._finished = False
        weight.grad = None

    def _sum(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        shape, device = self.weight.shape, self.weight.device
        if any(not part.is_sparse for part in parts):  # of compiled or exported code
            total = torch.zeros(shape, dtype=self.weight.dtype, device=device)
            for part in parts:
                total.add_(part)
            return nonzero_rows(total)
        rows = [torch.empty(0, dtype=torch.int64, device=device)]
        values = [torch.empty(0, shape[1], dtype=self.weight.dtype, device=device)]
        rows += [part._indices()[0] for part in parts]
        values += [part._values() for part in parts]
        return sum_rows(torch.cat(rows), torch.cat(values))


def row_store_of(parameter: Tensor) -> RowStore | None:
    """The store of a table's weight; None for all other parameters."""
    return getattr(parameter, _STORE, None)


def updated_rows(weight: Tensor) -> tuple[Tensor, int]:
    """The rows of a table that this process updates [rows, D], in place, and the first's number."""
    store = row_store_of(weight)
    return held_rows(weight.detach()) if store is None else store.held()


def row_gradient(weight: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """The row gradient of a table from rows, int64 [U] ascending and unique, and values [U, D]."""
    return torch.sparse_coo_tensor(
        rows[None], values, weight.shape, is_coalesced=True, check_invariants=False
    )


def sum_rows(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the values of equal rows, on a CPU in their order; the result is deterministic.

    Args:
        rows: int64 [N], in any order.
        values: [N, D].

    Returns:
        Rows [U], ascending, each once, and values [U, D].
    """
    unique, places = torch.unique(rows, return_inverse=True)
    # The backward pass of a small embedding: it sorts, where a scatter on a GPU adds in any order.
    summed = torch.ops.aten.embedding_dense_backward(values, places, len(unique), -1, False)
    return unique, summed


def nonzero_rows(dense: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [U] of a dense gradient [R, D] that are not zero, ascending, and their values."""
    rows = dense.any(1).nonzero()[:, 0]
    return rows, dense[rows]
