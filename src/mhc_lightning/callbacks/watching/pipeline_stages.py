"""The observations of all stages of a pipeline, in the order of the sub-layers."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils._pytree import tree_map_only

from mhc_lightning.callbacks.watching.observations import Observation
from mhc_lightning.strategies.layout import layout_of


def across_stages(
    trainer: pl.Trainer, observations: list[Observation], device: torch.device
) -> list[Observation]:
    """The observations of all stages, on every process of the pipeline.

    Every process gets all of them, so that actions on a callback's numbers are the same everywhere.
    Without a pipeline the observations are returned unchanged. With one, every process must call
    this.

    Args:
        trainer: The running trainer.
        observations: Those of this process's stages.
        device: The device of the tensors in the result.
    """
    layout = layout_of(trainer.strategy)
    if layout.pipeline_group is None:
        return observations

    def move(value: Any, to: torch.device | str) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(to), value)

    stages = layout.gather_over_pipeline(move(observations, "cpu"))
    ordered = sorted((o for stage in stages for o in stage), key=lambda o: o.stage)
    chain = [o._replace(layer=k, after=k - 1 if k else None) for k, o in enumerate(ordered)]
    return move(chain, device)
