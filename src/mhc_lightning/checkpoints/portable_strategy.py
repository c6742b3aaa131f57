"""The base of strategies that spread a module over processes, and save it for any layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from mhc_lightning.checkpoints.distributed_state import DistributedState


class PortableStrategy(ModelParallelStrategy):
    """Loads and saves so that a run resumes under any strategy and number of devices.

    A module may come with its network on `meta`: each process gives memory and values to its own
    part only. Lightning saves one whole file; `RunCheckpoint` can save parts.
    """

    _gathers = True

    def distributed_state(self) -> DistributedState:
        """The state of the module and its optimizers; a subclass defines it."""
        raise TypeError(f"{type(self).__name__} must define distributed_state")

    @contextmanager
    def in_parts(self) -> Iterator[None]:
        """Within, state dicts hold this process's part only, without the optimizers' state."""
        self._gathers = False
        try:
            yield
        finally:
            self._gathers = True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole module's state on rank zero, empty elsewhere."""
        if not self._gathers:
            assert self.model is not None
            return self.model.state_dict()
        return self.distributed_state().gather_module()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole optimizer's state on rank zero, as one process has it; empty elsewhere."""
        if not self._gathers:
            return {}
        return self.distributed_state().gather_optimizer(
            getattr(optimizer, "_optimizer", optimizer)
        )

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load this process's part of a checkpoint, a whole file or a folder."""
        path = Path(self.broadcast(checkpoint_path))
        whole = self.distributed_state()
        load = whole.load_folder if path.is_dir() else whole.load_file
        return load(path, self.optimizers, weights_only)
