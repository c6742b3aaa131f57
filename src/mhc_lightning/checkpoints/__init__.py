"""Checkpoints of a run: written, checked, found, kept, and resumed from."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhc_lightning.checkpoints.run_checkpoint import RunCheckpoint

__all__ = ["RunCheckpoint"]


def __getattr__(name: str) -> Any:
    # Loaded at first use: it imports Lightning, which readers of a run's folder do without.
    if name != "RunCheckpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("mhc_lightning.checkpoints.run_checkpoint").RunCheckpoint
