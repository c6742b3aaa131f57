"""A table of n-grams in the memory of the machine, of which all its processes share one copy."""

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mhc_lightning.errors import UserError
from mhc_lightning.modules.memory import NgramTable
from mhc_lightning.modules.memory.row_store import RowStore, sum_rows
from mhc_lightning.strategies.row_exchange import RowExchange, host_group

SHARED_MEMORY = Path("/dev/shm")

_Fetched = tuple[Tensor, Tensor]  # rows and their values, in CPU memory


class HostRows(RowStore):
    """The rows of a table in the machine's memory; each process updates its own part of them.

    Gradients go to the process that updates their rows, which adds them up in the order of the
    processes. Another thread then updates the rows, waits until all processes have done so, and
    gathers rows: those of the next micro-batch while the present one is computed, if they are
    known. It works in the order in which it is asked to, so that rows are gathered as the last
    update has left them. Without `deterministic` it does not wait for that update: rows that it
    changes may be one step old, on some processes and not on others.

    Shapes: R rows of the table, D their width, U rows of a gradient.

    Args:
        weight: The table [R, D], the same memory in all processes.
        exchange: The exchange of this table's gradients, in CPU memory; None if one process has
            the table to itself.
        turn: The same processes once more, for the other thread alone.
        deterministic: Whether rows are always those that the last update has left.
    """

    keeps_place = True

    def __init__(
        self,
        weight: nn.Parameter,
        exchange: RowExchange | None,
        turn: dist.ProcessGroup | None,
        deterministic: bool = True,
    ) -> None:
        super().__init__(weight)
        self.exchange, self.deterministic, self._turn = exchange, deterministic, turn
        self._ahead: tuple[Tensor, Future[_Fetched]] | None = None
        self._after_update: Tensor | None = None  # rows to gather behind the next update
        self._prefetched: _Fetched | None = None  # of the next micro-batch; the thread's own
        self._updates: list[Future[None]] = []
        self._mesh: DeviceMesh | None = None
        if exchange is not None:
            names = ("data_parallel",)
            self._mesh = DeviceMesh.from_group(exchange.group, "cpu", mesh_dim_names=names)

    @torch.compiler.disable
    def fetch_ahead(self, rows: Tensor) -> None:
        """Begin to gather rows in another thread, while the device computes the blocks before."""
        self._ahead = rows, _worker().submit(self._fetch, rows)

    @torch.compiler.disable
    def prefetch(self, rows: Tensor, before_update: bool) -> None:
        """Gather rows of the next micro-batch, behind the update if there is one before."""
        if before_update and self.deterministic:
            self._after_update = rows
        else:
            _worker().submit(self._gather_next, rows)

    @torch.compiler.disable
    def look_up(self, rows: Tensor) -> Tensor:
        """Rows, int64 [..., H] -> values [..., H, D] on the device of the rows."""
        ahead, self._ahead = self._ahead, None
        fetched = ahead[1].result() if ahead is not None and ahead[0] is rows else None
        if fetched is None:  # a block that backward computes again, or rows of one's own
            self.settle()
            fetched = _gather(self.weight.detach(), rows)
        return _LookUp.apply(self.weight, rows.device, *fetched)

    def combine(self, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over all shares of the batch, for the rows that this process updates."""
        if self.exchange is None:
            return rows, values
        rows, values = sum_rows(*self.exchange.send(rows, values))
        return rows, values / self.exchange.size

    def norm(self, dtype: torch.dtype) -> Tensor:
        """The Euclidean norm of the whole table's gradient, a scalar, alike on every process."""
        own = super().norm(dtype)
        return own if self.exchange is None else self.exchange.sum(own**2).sqrt()

    def held(self) -> tuple[Tensor, int]:
        """The rows that this process updates [rows, D], in place, and the first one's number."""
        whole = self.weight.detach()
        if self.exchange is None:
            return whole, 0
        return whole[self.exchange.first :][: self.exchange.each], self.exchange.first

    def as_sharded(self) -> Tensor:
        """The rows that this process updates, as a part of the whole table; no copy."""
        if self._mesh is None:
            return self.weight.detach()
        shape, stride = self.weight.shape, self.weight.stride()
        return DTensor.from_local(
            self.held()[0], self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    def apply(self, update: Callable[[], object]) -> None:
        """Have the other thread run the update, and wait there until all processes have."""
        self._updates.append(_worker().submit(self._update, update))
        if self._after_update is not None:
            _worker().submit(self._gather_next, self._after_update)
            self._after_update = None

    def settle(self) -> None:
        """Wait until all processes have updated their rows.

        The other thread is then at rest, with all tables.
        """
        updates, self._updates = self._updates, []
        for update in updates:
            update.result()  # raises what the update has raised
        _worker().submit(int).result()

    def _update(self, update: Callable[[], object]) -> None:
        update()
        if self._turn is not None:
            dist.barrier(self._turn)

    def _gather_next(self, rows: Tensor) -> None:
        self._prefetched = _gather(self.weight.detach(), rows)

    def _fetch(self, rows: Tensor) -> _Fetched:
        """Rows and values: those that were gathered before, if they are of the same rows."""
        found, self._prefetched = self._prefetched, None
        here = rows.to("cpu")
        if found is not None and torch.equal(found[0], here):
            return found
        return _gather(self.weight.detach(), here, to=rows.device)


class _LookUp(torch.autograd.Function):
    """Values of rows in the machine's memory; the gradient is sparse, and in that memory too."""

    @staticmethod
    def forward(ctx, weight, device, rows, values):  # type: ignore[no-untyped-def]
        ctx.rows, ctx.shape = rows, weight.shape
        return values.to(device, non_blocking=True)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, values = ctx.rows.reshape(1, -1), grad.reshape(-1, grad.shape[-1]).to("cpu")
        grad = torch.sparse_coo_tensor(rows, values, ctx.shape, check_invariants=False)
        return grad, None, None, None


@cache
def _worker() -> ThreadPoolExecutor:
    """The thread that updates and gathers rows, of all tables, in the order of the calls."""
    return ThreadPoolExecutor(1, thread_name_prefix="rows")


@torch.no_grad()
def _gather(weight: Tensor, rows: Tensor, to: torch.device | None = None) -> _Fetched:
    """Rows in CPU memory, and their values; pinned if they go to a device."""
    here = rows.to("cpu")
    values = weight[here]
    return here, values if (to or rows.device).type == "cpu" else values.pin_memory()


def _save_own_rows(table: Any, state: dict[str, Any], prefix: str, _: object) -> None:
    """Have each process save and load its own rows of a table, as if the table were sharded."""
    if isinstance(table.store, HostRows):
        table.store.settle()
        state[f"{prefix}weight"] = table.store.as_sharded()


def put_on_host(
    tables: Iterable[NgramTable], group: dist.ProcessGroup | None, deterministic: bool = True
) -> set[nn.Parameter]:
    """Move whole tables into memory that the processes of a group share, and give them stores.

    Tables on meta get their initial values, each process its own rows.

    Args:
        tables: The tables, the same in every process.
        group: The processes; None for this one alone.
        deterministic: See `HostRows`.

    Returns:
        The new weights.

    Raises:
        UserError: The machine has too little memory for them, before any is taken; or the
            processes are on several machines.
    """
    tables = [table for table in tables if not isinstance(table.store, HostRows)]
    shared = group if group is not None and dist.get_world_size(group) > 1 else None
    host, turn = None, None
    if shared is not None:
        host, ranks = host_group(shared), dist.get_process_group_ranks(shared)
        turn = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    moving = [t.weight for t in tables if not _is_in_place(t.weight, host)]
    if moving:
        _require_memory(sum(w.numel() * w.element_size() for w in moving), host)
    for table in tables:
        whole, heads = table.weight, table.num_rows // table.rows_per_head
        exchange = None if host is None else RowExchange(table.num_rows, heads, host, host)
        if not _is_in_place(whole, host):
            table.weight = nn.Parameter(_new_memory(whole, host), whole.requires_grad)
        table.store = store = HostRows(table.weight, exchange, turn, deterministic)
        table.register_state_dict_post_hook(_save_own_rows)
        part, first = store.held()
        with torch.no_grad():
            if table.weight is not whole and not whole.is_meta:
                part.copy_(whole[first : first + len(part)])
            elif whole.is_meta:
                draw: Any = table.reset_parameters
                draw.fill_rows(part, first)
        if turn is not None:
            dist.barrier(turn)
    return {table.weight for table in tables}


def _is_in_place(weight: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether a table can stay: there is no other process, and no device that needs it pinned."""
    return group is None and weight.device.type == "cpu" and not torch.cuda.is_available()


def _new_memory(like: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Memory for a tensor's values, the same in all processes of a group."""
    if group is None:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=torch.cuda.is_available())
    name: list[str] = [""]
    size = like.numel() * like.element_size()
    if dist.get_rank(group) == 0:
        handle, name[0] = tempfile.mkstemp(prefix="mhc_lightning_", dir=SHARED_MEMORY)
        os.posix_fallocate(handle, 0, max(1, size))
        os.close(handle)
    dist.broadcast_object_list(name, group=group, group_src=0)
    try:
        flat = torch.from_file(name[0], shared=True, size=like.numel(), dtype=like.dtype)
        dist.barrier(group)
    finally:  # the memory lives as long as a process has it
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name[0])
    return flat.view(like.shape)


def _require_memory(needed: int, group: dist.ProcessGroup | None) -> None:
    found: list[tuple[int, str] | None] = [None]
    if group is None or dist.get_rank(group) == 0:
        found[0] = _shortage(needed, shared=group is not None)
    if group is not None:
        hosts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(hosts, socket.gethostname(), group=group)
        if len(set(hosts)) > 1:
            raise UserError(
                "memory.placement=host shares one copy of the rows among processes of one machine,"
                f" but these are on {len(set(hosts))}; use memory.placement=sharded"
            )
        dist.broadcast_object_list(found, group=group, group_src=0)
    if found[0] is not None:
        free, where = found[0]
        raise UserError(
            f"memory.placement=host needs {needed / 1e9:.1f} GB for the memory's rows, but {where}"
            f" has {free / 1e9:.1f} GB free; use fewer memory.rows, or memory.placement=sharded"
        )


def _shortage(needed: int, shared: bool) -> tuple[int, str] | None:
    """The bytes that are free, and where, if the machine cannot hold so many; None if it can."""
    free, where = available_memory(), "the machine's memory"
    if shared and SHARED_MEMORY.is_dir():
        in_shared = shutil.disk_usage(SHARED_MEMORY).free
        if free is None or in_shared < free:
            free, where = in_shared, str(SHARED_MEMORY)
    return None if free is None or needed <= free else (free, where)


def available_memory() -> int | None:
    """Bytes that new processes can take on this machine; None where the system does not say."""
    try:
        content = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    _, found, rest = content.partition("MemAvailable:")
    return 1024 * int(rest.split()[0]) if found else None
