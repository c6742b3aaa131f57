"""One view of numbers for all processes of a run, so that they act alike."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist


def first_process_values(
    trainer: pl.Trainer, values: Mapping[str, Any], failed: bool = False
) -> tuple[dict[str, float], bool]:
    """The first process's values, read in one transfer, and whether any process failed.

    Every process must call this, with the same tags.

    Args:
        trainer: The running trainer.
        values: Numbers or scalar tensors by tag.
        failed: Whether this process failed.
    """
    device = trainer.strategy.root_device
    numbers = [*values.values(), float(failed)]
    row = torch.stack([torch.as_tensor(n, dtype=torch.float32, device=device) for n in numbers])
    rows = [row]
    if trainer.world_size > 1:
        rows = [torch.empty_like(row) for _ in range(trainer.world_size)]
        dist.all_gather(rows, row)
    table = torch.stack(rows).tolist()
    return dict(zip(values, table[0][:-1], strict=True)), any(row[-1] for row in table)
