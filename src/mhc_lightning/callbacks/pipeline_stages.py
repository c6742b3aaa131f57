"""Brings what was seen on the stages of a pipeline together, in the order of the sub-layers."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from mhc_lightning.callbacks.observations import Observation


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
    group = getattr(trainer.strategy, "pipeline_group", None)
    if group is None:
        return observations

    def moved(value: Any, to: torch.device | str) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(to), value)

    stages: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(stages, moved(observations, "cpu"), group=group)
    everything = [observation for stage in stages for observation in stage]
    ordered = sorted(everything, key=lambda observation: observation.stage)
    chain = [o._replace(layer=k, after=k - 1 if k else None) for k, o in enumerate(ordered)]
    return moved(chain, device)
