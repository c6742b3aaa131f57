"""FSDP2 over all devices of a run."""

import lightning.pytorch as pl
from torch.distributed.device_mesh import DeviceMesh

from mhc_lightning.checkpoints.distributed_state import DistributedState
from mhc_lightning.checkpoints.portable_strategy import PortableStrategy
from mhc_lightning.errors import UserError
from mhc_lightning.modules.token_exchange import AtHome
from mhc_lightning.planning.expert_parallel import KEY, ExpertParallel, experts_of
from mhc_lightning.strategies.expert_parallel import expert_mesh
from mhc_lightning.strategies.layout import Layout, mesh_layout, ranks_of
from mhc_lightning.strategies.watched_strategy import WatchedStrategy


class FullyShardedStrategy(WatchedStrategy, PortableStrategy):
    """Lightning's ModelParallelStrategy with every process in the data-parallel dimension.

    The LightningModule shards itself over `device_mesh["data_parallel"]`. A run resumes under any
    strategy and number of devices. A module may come with its network on `meta`: no process ever
    builds the network whole. `configure_model` gives memory and values to this process's part.

    Args:
        timeout_seconds: Longest time that a process waits for another; one that others wait for
            longer counts as hung.
        expert_parallel_size: Processes that share the routed experts of each block, neighbours:
            tokens are sent to the experts, and only the processes that hold the same ones gather
            them. 1 to gather all experts in every process.

    Raises:
        UserError: A value is out of range.
    """

    def __init__(self, timeout_seconds: float = 1800, expert_parallel_size: int = 1) -> None:
        super().__init__(timeout_seconds, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.expert_parallel_size = ExpertParallel(expert_parallel_size).size
        self._expert_mesh: DeviceMesh | None = None

    def check(self, module: pl.LightningModule) -> None:
        """Refuse a module whose experts cannot be spread, before any process group exists.

        Raises:
            UserError: Says which sizes would do.
        """
        processes = self.num_nodes * self.num_processes
        ExpertParallel(self.expert_parallel_size).check(module, processes)

    def setup_environment(self) -> None:
        """Set the size of the mesh to the number of processes, which is known only now."""
        assert self.lightning_module is not None
        self.check(self.lightning_module)
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        if self.expert_parallel_size > 1 and self._expert_mesh is None:
            size = self.expert_parallel_size
            ranks = ranks_of(self.world_size, 1, size)
            self._expert_mesh = expert_mesh(self.root_device.type, size, ranks)

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up the module, which has spread its experts.

        Raises:
            UserError: It has not: `configure_model` did not call `shard`.
        """
        assert self.lightning_module is not None
        left = [m for m in experts_of(self.lightning_module) if isinstance(m.exchange, AtHome)]
        if self.expert_parallel_size > 1 and left:
            raise UserError(
                f"{KEY}={self.expert_parallel_size}, but the module has not spread its experts:"
                " call mhc_lightning.strategies.shard with experts=layout_of(strategy).expert_mesh"
                " in configure_model"
            )
        super().setup(trainer)

    def layout(self) -> Layout:
        """All processes are data-parallel."""
        return mesh_layout(
            self,
            self.num_nodes * self.num_processes,
            expert_mesh=self._expert_mesh,
            materialises_module=True,
        )

    def distributed_state(self) -> DistributedState:
        """Every process has a part of every tensor."""
        assert self.model is not None
        return DistributedState(self.model, self.root_device, self.device_mesh["data_parallel"])
