"""FSDP2 over all devices of a run."""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from mhc_lightning.strategies.whole_state import WholeState


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with every process in the data-parallel dimension.

    The LightningModule shards itself over ``device_mesh["data_parallel"]``. Checkpoints are whole
    files, so that a run resumes under any strategy and number of devices.

    Attributes:
        materialises_model: A module may come with its network on ``meta``: no process ever builds
            it whole, ``configure_model`` gives this process's part memory and values.
    """

    materialises_model = True

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Size the mesh by the number of processes, which is known only now."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole module's state on rank zero, nothing elsewhere."""
        return self._whole.gather_module()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole optimizer's state on rank zero, as one process would have it; else nothing."""
        return self._whole.gather_optimizer(getattr(optimizer, "_optimizer", optimizer))

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load this process's part of a whole checkpoint file."""
        path = self.broadcast(checkpoint_path)
        return self._whole.load_file(path, self.optimizers, weights_only)

    @property
    def _whole(self) -> WholeState:
        assert self.model is not None
        return WholeState(self.model, self.root_device, self.device_mesh["data_parallel"])
