"""The states of all processes' random number generators, as plain values for a checkpoint."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch


def gather_random_states(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """The states of every process, by rank; every process calls this."""
    own = capture_random_state(trainer.strategy.root_device)
    if trainer.world_size == 1:
        return [own]
    states: list[dict[str, Any]] = [{} for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(states, own)
    return states


def capture_random_state(device: torch.device) -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators (and `device`'s, if it is a GPU)."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put every generator back into a captured state; a GPU's only where `device` is one."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
