"""Checkpoints of a run.

| question | file |
|---|---|
| when is one saved, and how does a run resume? | `run_checkpoint` |
| … on SIGTERM? | `termination` |
| … with which generators and counters? | `random_state`, `loop_counters` |
| how is one saved? | `saver`, in one of two `forms`: `file_writing` or `folder_writing` |
| what is in a folder? | `folder_index`, `saved_tensors` |
| how is one read? | `reading` |
| how is a module built from one alone? | `rebuilding`, from its `hyper_parameters` |
| why was one refused? | `refusals` |
| what are they called, and which is `last`? | `names` |
| which are deleted? | `retention` |
| how does a spread module save and load? | `distributed_state`, `portable_strategy` |
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhc_lightning.checkpoints.run_checkpoint import RunCheckpoint

__all__ = ["RunCheckpoint"]


def __getattr__(name: str) -> Any:
    # `run_checkpoint` loads at first use: it imports Lightning, which readers of a run do not need.
    if name != "RunCheckpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("mhc_lightning.checkpoints.run_checkpoint").RunCheckpoint
