"""Which placements of a memory's tables a strategy can train."""

from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, Strategy
from torch import nn

from mhc_lightning.checkpoints.portable_strategy import PortableState
from mhc_lightning.errors import UserError
from mhc_lightning.modules.memory import Memory


def placement_of(root: nn.Module) -> str | None:
    """Where the memory below a module wants its rows; None without a memory that has any."""
    for module in root.modules():
        if isinstance(module, Memory) and module.hash is not None:
            return module.placement
    return None


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
    if placement == "sharded":
        raise UserError(
            f"memory.placement=sharded does not work with {type(strategy).__name__}; use"
            " strategy=ddp (mhc_lightning.strategies.DataParallelStrategy)"
        )
