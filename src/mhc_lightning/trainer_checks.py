"""What a trainer must not ask of a language model, refused before the first step."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning, WeightAveraging
from torch import nn

from mhc_lightning.checkpoints.saved_memory import memory_in
from mhc_lightning.errors import UserError
from mhc_lightning.modules import Connection


def check_trainer(trainer: pl.Trainer, network: nn.Module) -> None:
    """Check the trainer's clipping and callbacks.

    Raises:
        UserError: The trainer would clip gradients wrongly, or a callback would spoil the network.
    """
    limit = trainer.gradient_clip_val
    if limit is not None and not limit >= 0:
        raise UserError(f"trainer.gradient_clip_val must be at least 0, or null, not {limit}")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise UserError(
            f"trainer.precision={trainer.precision} is not supported (gradients would be"
            " clipped at their scaled size); use bf16-mixed"
        )
    callbacks: Iterable[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for kind, check in _CHECKS.items():
            if isinstance(callback, kind):
                check(callback, network)


def _check_averaging(callback: Any, network: nn.Module) -> None:
    if callback._use_buffers and memory_in(network).hash is not None:
        raise UserError(
            f"{type(callback).__name__} averages buffers, among them the constants of the"
            " memory's hash, which would no longer be whole numbers; give it"
            " use_buffers=False"
        )


def _check_pruning(callback: Any, network: nn.Module) -> None:
    if any(isinstance(module, Connection) for module, _ in callback._parameters_to_prune):
        raise UserError(
            "ModelPruning would prune the biases of connections, which are read without a call of"
            ' the connection; give it parameters_to_prune=[(m, "weight") for m in model.modules()'
            " if isinstance(m, torch.nn.Linear)]"
        )


_CHECKS: dict[type[pl.Callback], Callable[[Any, nn.Module], None]] = {
    WeightAveraging: _check_averaging,
    ModelPruning: _check_pruning,
}
