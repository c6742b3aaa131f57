"""Where the tables of a memory are put, and which strategies can train them there."""

from collections.abc import Iterable

from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mhc_lightning.checkpoints.portable_strategy import PortableState
from mhc_lightning.errors import UserError
from mhc_lightning.modules.memory import Memory, NgramTable
from mhc_lightning.strategies.host_rows import HostRows, put_on_host
from mhc_lightning.strategies.sharded_rows import ShardedRows, shard_rows, tables_of


def placement_of(root: nn.Module) -> str | None:
    """Where the memory below a module wants its rows; None without a memory that has any."""
    memory = _memory_in(root)
    return None if memory is None else memory.placement


def _memory_in(root: nn.Module) -> Memory | None:
    return next((m for m in root.modules() if isinstance(m, Memory) and m.hash is not None), None)


def shared_out(root: nn.Module) -> bool:
    """Whether the processes share out the rows of tables below `root`, or their updates."""
    return any(isinstance(t.store, ShardedRows | HostRows) for t in tables_of(root).values())


def require_placement(root: nn.Module, strategy: Strategy) -> None:
    """Refuse a memory that a strategy does not train as one process would.

    This package's strategies train all placements. Lightning's DDPStrategy trains tables of which
    every process has a copy. Others would cut or flatten tables in ways of their own.

    Args:
        root: The module to train.
        strategy: The trainer's strategy.

    Raises:
        UserError: Says which strategy to use.
    """
    placement = placement_of(root)
    one = not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1
    if placement is None or one or isinstance(strategy, PortableState):
        return
    if not isinstance(strategy, DDPStrategy):
        raise UserError(
            f"{type(strategy).__name__} cannot train a memory of n-grams; use strategy=fsdp or ddp"
            " (FullyShardedStrategy or DataParallelStrategy of mhc_lightning.strategies)"
        )
    if placement != "device":
        raise UserError(
            f"memory.placement={placement} does not work with {type(strategy).__name__}; use"
            " strategy=ddp (mhc_lightning.strategies.DataParallelStrategy)"
        )


def place_tables(
    root: nn.Module, tables: Iterable[NgramTable], mesh: DeviceMesh | None
) -> set[nn.Parameter]:
    """Put whole tables where the memory below `root` wants them, if that is not the device.

    Under FSDP and in pipelines that share a batch, `device` is the same as `sharded`: no process
    has copies of what others have.

    Args:
        root: The module that has the memory.
        tables: Whole tables, which may be on meta.
        mesh: The data-parallel processes; None for this one alone.

    Returns:
        The new weights, which neither FSDP nor DDP may touch.

    Raises:
        UserError: The machine has too little memory.
    """
    if placement_of(root) == "host":
        memory = _memory_in(root)
        assert memory is not None
        group = None if mesh is None else mesh.get_group()
        return put_on_host(tables, group, memory.deterministic)
    return set() if mesh is None else shard_rows(tables, mesh)
