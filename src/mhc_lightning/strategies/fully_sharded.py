"""FSDP2 over all devices of a run."""

from mhc_lightning.checkpoints.distributed_state import DistributedState
from mhc_lightning.checkpoints.portable_strategy import PortableStrategy
from mhc_lightning.strategies.layout import Layout, mesh_layout
from mhc_lightning.strategies.watched_strategy import WatchedStrategy


class FullyShardedStrategy(WatchedStrategy, PortableStrategy):
    """Lightning's ModelParallelStrategy with every process in the data-parallel dimension.

    The LightningModule shards itself over `device_mesh["data_parallel"]`. A run resumes under any
    strategy and number of devices. A module may come with its network on `meta`: no process ever
    builds the network whole. `configure_model` gives memory and values to this process's part.

    Args:
        timeout_seconds: Longest time that a process waits for another; one that others wait for
            longer counts as hung.
    """

    def __init__(self, timeout_seconds: float = 1800) -> None:
        super().__init__(timeout_seconds, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Set the size of the mesh to the number of processes, which is known only now."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def layout(self) -> Layout:
        """All processes are data-parallel."""
        return mesh_layout(self, self.num_nodes * self.num_processes, materialises_module=True)

    def distributed_state(self) -> DistributedState:
        """Every process has a part of every tensor."""
        assert self.model is not None
        return DistributedState(self.model, self.root_device, self.device_mesh["data_parallel"])
