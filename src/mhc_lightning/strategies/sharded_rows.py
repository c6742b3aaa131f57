"""A table of n-grams whose rows are shared out among the processes of a data-parallel group."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mhc_lightning.modules.initialisation import held_rows
from mhc_lightning.modules.memory import NgramTable
from mhc_lightning.modules.memory.row_store import RowStore, sum_rows
from mhc_lightning.strategies.row_exchange import RowExchange, host_group


class ShardedRows(RowStore):
    """The rows of a table that lie on several processes; each updates those that it holds.

    Shapes: R rows of the table, D their width, U rows of a gradient.

    Args:
        weight: The table, a DTensor [R, D] that is sharded by rows over the data-parallel group.
        exchange: The exchange of this table's rows.
    """

    def __init__(self, weight: nn.Parameter, exchange: RowExchange) -> None:
        super().__init__(weight)
        self.exchange = exchange

    @torch.compiler.disable
    def look_up(self, rows: Tensor) -> Tensor:
        """Rows, int64 [..., H] -> values [..., H, D]; all processes call this at the same time."""
        return _LookUp.apply(self.weight, rows, self.exchange)

    def combine(self, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over all shares of the batch, for the rows that this process holds.

        Values of a row are added up in the order of the processes: the sum is deterministic.
        """
        rows, values = sum_rows(*self.exchange.send(rows, values))
        return rows, values / self.exchange.size

    def norm(self, dtype: torch.dtype) -> Tensor:
        """The Euclidean norm of the whole table's gradient, a scalar, alike on every process."""
        return self.exchange.sum(super().norm(dtype) ** 2).sqrt()


class _LookUp(torch.autograd.Function):
    """Values of rows of a sharded table; the gradient is a sparse one of the whole table's shape.

    `backward` does not communicate: row gradients go to their owners once in an optimizer step.
    """

    @staticmethod
    def forward(ctx, weight, rows, exchange):  # type: ignore[no-untyped-def]
        ctx.rows, ctx.shape = rows, weight.shape
        return exchange.fetch(rows, held_rows(weight.detach())[0])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, values = ctx.rows.reshape(1, -1), grad.reshape(-1, grad.shape[-1])
        return torch.sparse_coo_tensor(rows, values, ctx.shape, check_invariants=False), None, None


def tables_of(root: nn.Module) -> dict[str, NgramTable]:
    """The tables below a module, by their names in it."""
    return {name: module for name, module in root.named_modules() if isinstance(module, NgramTable)}


def sharded_tables(root: nn.Module) -> dict[str, NgramTable]:
    """The tables below a module that `shard_rows` has cut."""
    return {
        name: table for name, table in tables_of(root).items() if isinstance(table.weight, DTensor)
    }


def shard_rows(tables: Iterable[NgramTable], mesh: DeviceMesh) -> set[nn.Parameter]:
    """Leave of each table the rows that this process holds; a table may be on meta.

    Tables get their stores by `store_sharded_rows`, once they have memory.

    Args:
        tables: Whole tables.
        mesh: One-dimensional, the processes that share the rows.

    Returns:
        The new weights, which are DTensors.
    """
    weights = set()
    for table in tables:
        whole, each = table.weight, -(-table.num_rows // mesh.size())
        first = min(each * mesh.get_local_rank(), table.num_rows)
        held: Any = whole.detach()[first : first + each]
        held = held.clone() if held.is_meta else held.to(mesh.device_type, copy=True)
        part = DTensor.from_local(
            held, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        table.weight = nn.Parameter(part, whole.requires_grad)
        weights.add(table.weight)
    return weights


def store_sharded_rows(root: nn.Module) -> None:
    """Give the tables below `root` that `shard_rows` has cut new stores; all processes call this.

    A weight loses its store when it is moved or cast.
    """
    host_groups: dict[Any, Any] = {}
    for table in sharded_tables(root).values():
        weight: Any = table.weight
        if isinstance(table.store, ShardedRows):
            exchange = table.store.exchange
            table.store.remove()
        else:
            group = weight.device_mesh.get_group()
            if group not in host_groups:
                host_groups[group] = host_group(group)
            heads = table.num_rows // table.rows_per_head
            exchange = RowExchange(table.num_rows, heads, group, host_groups[group])
        table.store = ShardedRows(weight, exchange)
