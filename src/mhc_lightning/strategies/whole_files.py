"""The base of strategies that spread a module, and save it as one process would."""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from mhc_lightning.strategies.whole_state import WholeState


class WholeFileStrategy(ModelParallelStrategy):
    """Saves whole files, so that a run resumes under any strategy and number of devices.

    A module may come with its network on ``meta``: each process gives only its part memory and
    values.
    """

    materialises_model = True

    def whole_state(self) -> WholeState:
        """What gathers and loads this process's part; a subclass defines it."""
        raise TypeError(f"{type(self).__name__} must define whole_state")

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole module's state on rank zero, nothing elsewhere."""
        return self.whole_state().gather_module()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole optimizer's state on rank zero, as one process would have it; else nothing."""
        return self.whole_state().gather_optimizer(getattr(optimizer, "_optimizer", optimizer))

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load this process's part of a whole checkpoint file."""
        path = self.broadcast(checkpoint_path)
        return self.whole_state().load_file(path, self.optimizers, weights_only)
