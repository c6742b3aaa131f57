"""Brings what was seen on the stages of a pipeline together, in the order of the sub-layers."""

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

    Every one gets them all, so that whatever acts on a callback's numbers acts alike everywhere.
    Without a pipeline they are returned as they are. With one, every process must call this.

    Args:
        trainer: The running trainer.
        observations: Those of this process's stages.
        device: Where the tensors of the result are to be.
    """
    layout = layout_of(trainer.strategy)
    if layout.pipeline_group is None:
        return observations

    def moved(value: Any, to: torch.device | str) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(to), value)

    stages = layout.gather_over_pipeline(moved(observations, "cpu"))
    everything = [observation for stage in stages for observation in stage]
    ordered = sorted(everything, key=lambda observation: observation.stage)
    chain = [o._replace(layer=k, after=k - 1 if k else None) for k, o in enumerate(ordered)]
    return moved(chain, device)
