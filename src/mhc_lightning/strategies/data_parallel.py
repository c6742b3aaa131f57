"""Data parallelism: each device holds the model and takes its share of every batch."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from mhc_lightning.checkpoints.distributed_state import DistributedState
from mhc_lightning.checkpoints.portable_strategy import PortableState
from mhc_lightning.strategies.layout import Layout
from mhc_lightning.strategies.placements import place_tables, placement_of
from mhc_lightning.strategies.sharded_rows import sharded_tables, store_sharded_rows, tables_of
from mhc_lightning.strategies.sharding import bring_to_life
from mhc_lightning.strategies.watched_strategy import WatchedStrategy


class DataParallelStrategy(WatchedStrategy, PortableState, DDPStrategy):
    """Lightning's DDPStrategy, whose processes watch over each other.

    A memory with `placement=sharded` has its rows shared out among the processes, and one with
    `placement=host` is in the machine's memory once for all. A module may come with its network on
    `meta`: no process then ever builds a table that is shared out whole.

    Args:
        timeout_seconds: Seconds that a process waits for another before that one counts as hung.
        gradient_as_bucket_view: True to make gradients views of the buckets that are sent, which
            saves copies.
    """

    _backward_waits = True

    def __init__(
        self, timeout_seconds: float = 1800, gradient_as_bucket_view: bool = False
    ) -> None:
        super().__init__(timeout_seconds, gradient_as_bucket_view=gradient_as_bucket_view)
        self._table_mesh: DeviceMesh | None = None

    def layout(self) -> Layout:
        """All processes are data-parallel."""
        sampler = self.distributed_sampler_kwargs
        return Layout(sampler["num_replicas"], sampler["rank"], materialises_module=True)

    @property
    def spreads_module(self) -> bool:
        """Whether a memory's tables are shared out."""
        return self._table_mesh is not None

    def distributed_state(self) -> DistributedState:
        """Every process has a part of the tables, and all else."""
        assert self.lightning_module is not None
        return DistributedState(self.lightning_module, self.root_device, self._table_mesh)

    def setup_environment(self) -> None:
        """Let the processes meet, share out tables, and give the module memory and values."""
        super().setup_environment()
        module = self.lightning_module
        assert module is not None
        placed = placement_of(module) in ("sharded", "host")
        if self.world_size > 1 and placed:
            self._table_mesh = init_device_mesh(
                self.root_device.type, (self.world_size,), mesh_dim_names=("data_parallel",)
            )
            sharded = sharded_tables(module)
            whole = [table for name, table in tables_of(module).items() if name not in sharded]
            place_tables(module, whole, self._table_mesh)
        bring_to_life([module], self.root_device)
        store_sharded_rows(module)

    def setup(self, trainer: Any) -> None:
        """Set up the module, of which DDP leaves the shared-out tables alone."""
        module: Any = self.lightning_module
        ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        if self.spreads_module:
            ignored |= {f"{name}.weight" for name in tables_of(module)}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
        super().setup(trainer)
