"""The base of strategies that spread a module over processes, and save it for any layout."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.optim import Optimizer

from mhc_lightning.checkpoints.distributed_state import DistributedState


class PortableState(Strategy):
    """Loads and saves so that a run resumes under any strategy and number of devices.

    A module may come with its network on `meta`: each process gives memory and values to its own
    part only. Lightning saves one whole file; `RunCheckpoint` can save parts. Inherit from it
    before one of Lightning's strategies.
    """

    _gathers = True

    @property
    def spreads_module(self) -> bool:
        """Whether processes hold different parts of the module; if not, Lightning loads and saves.

        It is known once the processes have met.
        """
        return True

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
            assert self.lightning_module is not None
            return self.lightning_module.state_dict()
        if not self.spreads_module:
            return super().lightning_module_state_dict()
        return self.distributed_state().gather_module()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole optimizer's state on rank zero, as one process has it; empty elsewhere."""
        if not self._gathers:
            return {}
        if not self.spreads_module:
            return super().optimizer_state(optimizer)
        return self.distributed_state().gather_optimizer(
            getattr(optimizer, "_optimizer", optimizer)
        )

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load this process's part of a checkpoint, a whole file or a folder."""
        if not self.spreads_module:
            return super().load_checkpoint(checkpoint_path, weights_only)
        path = Path(self.broadcast(checkpoint_path))
        whole = self.distributed_state()
        load = whole.load_folder if path.is_dir() else whole.load_file
        return load(path, self.optimizers, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has loaded the module."""
        if not self.spreads_module:
            super().load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: `load_checkpoint` has loaded the optimizers."""
        if not self.spreads_module:
            super().load_optimizer_state_dict(checkpoint)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """A module is loaded once each process has its part."""
        return self.spreads_module or super().restore_checkpoint_after_setup

    @property
    def lightning_restore_optimizer(self) -> bool:
        """False where `load_checkpoint` loads the optimizers."""
        return not self.spreads_module and super().lightning_restore_optimizer


class PortableStrategy(PortableState, ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with checkpoints for any layout."""
