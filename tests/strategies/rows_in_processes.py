"""Looks rows up in tables that lie on all processes, and compares with a whole table; see its test.

Run by torchrun. Shapes: R rows of the table, H heads, D width, W processes.
"""

import itertools
import math
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mhc_lightning.modules.memory import NgramTable
from mhc_lightning.strategies.sharded_rows import ShardedRows, shard_rows, store_sharded_rows

D = 3
POSITIONS = [(2, 5), (0, 0), (1, 1), (4, 2)]  # of each process: some more, some none


def table_of(heads: int, rows_per_head: int) -> NgramTable:
    """The same table everywhere; its rows need not be a multiple of anything."""
    sizes = SimpleNamespace(heads=heads, rows_per_head=rows_per_head)
    table = NgramTable(sizes, D).double()  # type: ignore[arg-type]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        table.weight.copy_(torch.randn(table.weight.shape, generator=generator))
    return table


def rows_of(rank: int, heads: int, rows_per_head: int, turn: int) -> torch.Tensor:
    """[B, S, H]: rows of a process, many of them equal, each head's from its own part."""
    shape = (*POSITIONS[(rank + turn) % len(POSITIONS)], heads)
    generator = torch.Generator().manual_seed(10 * rank + turn)
    within = torch.randint(0, max(1, rows_per_head // 2), shape, generator=generator)
    return within + torch.arange(heads) * rows_per_head


def check(mesh: DeviceMesh, heads: int, rows_per_head: int, by_heads: bool) -> None:
    world, rank = mesh.size(), mesh.get_local_rank()
    whole, root = table_of(heads, rows_per_head), nn.ModuleList([table_of(heads, rows_per_head)])
    (table,) = root
    assert isinstance(table, NgramTable)
    shard_rows([table], mesh)
    store_sharded_rows(root)
    store = table.store
    assert isinstance(store, ShardedRows) and store.exchange.by_heads == by_heads
    expected: list[torch.Tensor] = []
    for turn in range(2):  # as two accumulated batches
        for other in range(world):
            rows = rows_of(other, heads, rows_per_head, turn)
            values = whole(rows)
            if other == rank:
                ours = table(rows)
                assert torch.equal(ours, values), (heads, turn)
                (ours.sin() * 2).sum().backward()
            expected.append((values.sin() * 2).sum())
    (torch.stack(expected).sum() / world).backward()
    assert whole.weight.grad is not None
    store.finish()
    grad, (part, first) = table.weight.grad, store.held()
    own = slice(first, first + len(part))
    assert grad is not None and grad.is_sparse and grad.is_coalesced()
    held = grad.to_dense()
    torch.testing.assert_close(held[own], whole.weight.grad[own], rtol=1e-12, atol=1e-14)
    assert not held[:first].any() and not held[own.stop :].any(), "rows of others"
    norm = torch.linalg.vector_norm(whole.weight.grad)
    torch.testing.assert_close(store.norm(torch.float64), norm, rtol=1e-12, atol=0)
    store.clear()
    store.finish()  # a step without any look-up: no rows, and no process waits
    assert table.weight.grad is not None and table.weight.grad._nnz() == 0
    store.clear()


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",))
    for heads, rows_per_head in itertools.product((1, 2, 3, 4, 6), (1, 2, 5, 64)):
        even = math.gcd(heads, mesh.size()) == mesh.size()
        check(mesh, heads, rows_per_head, by_heads=even)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
