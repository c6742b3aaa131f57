"""Row gradients of a memory's tables, on one process and on several that each hold all rows."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mhc_lightning.modules.memory import NgramTable
from mhc_lightning.modules.memory.hashing import NgramHash
from mhc_lightning.modules.memory.row_store import RowStore, sum_rows
from mhc_lightning.strategies.layout import Layout
from mhc_lightning.strategies.sharded_rows import store_sharded_rows

# torch's name, on a module that is wrapped, for the parameters that DDP does not synchronise.
_LEFT_BY_DDP = "_ddp_params_and_buffers_to_ignore"


class ReplicatedRows(RowStore):
    """The rows of a table of which every data-parallel process has a copy, and trains all of it.

    In `finish` every process gets the row gradients of all, and adds them up in the order of the
    ranks: the copies stay bit for bit equal. It takes in memory and in bytes sent what all shares'
    rows take together.

    Args:
        weight: The table [R, D]; the first process's values go to the others.
        group: The processes; None for all.
    """

    def __init__(self, weight: nn.Parameter, group: dist.ProcessGroup | None) -> None:
        super().__init__(weight)
        self._group = group
        with torch.no_grad():
            dist.broadcast(weight, group=group, group_src=0)

    def combine(self, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over all processes."""
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(count) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(counts, count, group=self._group)
        sizes = torch.cat(counts).tolist()
        if not any(sizes):
            return rows, values
        rows = torch.cat(self._gathered(rows, sizes))
        values = torch.cat(self._gathered(values, sizes))
        rows, values = sum_rows(rows, values)
        return rows, values.div_(len(sizes))

    def _gathered(self, tensor: Tensor, sizes: list[int]) -> list[Tensor]:
        """The tensors [size, ...] of all processes, in order."""
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self._group)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def trained_tables(module: nn.Module) -> Iterator[tuple[str, NgramTable]]:
    """The tables of a module that are trained, by name."""
    for name, part in module.named_modules():
        if isinstance(part, NgramTable) and part.weight.requires_grad:
            yield name, part


def leave_tables_to_stores(module: nn.Module, leave: bool = True) -> None:
    """Have DDP leave a module's tables alone, or not: their stores combine gradients.

    With them go the constants of hashes, which are the same on every process. DDP would send them
    before every forward pass.
    """
    left = {f"{name}.weight" for name, _ in trained_tables(module)}
    for name, part in module.named_modules():
        if isinstance(part, NgramHash):
            left |= {f"{name}.{buffer}" for buffer, _ in part.named_buffers()}
    if left:
        others = [n for n in getattr(module, _LEFT_BY_DDP, ()) if n not in left]
        setattr(module, _LEFT_BY_DDP, [*others, *sorted(left)] if leave else others)


def install_row_stores(module: nn.Module, layout: Layout) -> None:
    """Give the trained tables of a module row gradients; their parameters must be final.

    Stores of an earlier fit, which an error may have left, are replaced.
    """
    remove_row_stores(module)
    store_sharded_rows(module)
    for _, table in trained_tables(module):
        if table.store is None and not isinstance(table.weight, DTensor):
            shared = layout.data_parallel_size > 1
            table.store = (
                ReplicatedRows(table.weight, layout.data_parallel_group)
                if shared
                else RowStore(table.weight)
            )


def settle_rows(module: nn.Module) -> None:
    """Wait until the tables of a module are as the last step leaves them."""
    for _, table in trained_tables(module):
        if table.store is not None:
            table.store.settle()


def finish_row_gradients(module: nn.Module) -> None:
    """Add up the row gradients of an optimizer step, over processes too; all of them call this."""
    for _, table in trained_tables(module):
        if table.store is not None:
            table.store.finish()


def remove_row_stores(module: nn.Module) -> None:
    """Give the tables of a module ordinary gradients again."""
    for part in module.modules():
        if isinstance(part, NgramTable) and part.store is not None:
            if isinstance(part.weight, DTensor) or part.store.keeps_place:
                continue  # they are found by their stores alone
            part.store.remove()
            part.store = None
