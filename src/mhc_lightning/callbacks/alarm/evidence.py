"""The numbers behind an alarm: equal values on all processes, sub-layers, the largest gradient."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mhc_lightning.modules.memory.row_store import row_store_of
from mhc_lightning.strategies.layout import layout_of


def first_process_values(
    trainer: pl.Trainer, values: Mapping[str, Any], failed: bool = False
) -> tuple[dict[str, float], bool]:
    """The first process's values, and whether any process failed; equal on every process.

    Every process must call this, with the same tags. All numbers are read in one transfer.

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
    table = torch.stack(rows).tolist()  # [processes, tags + 1]
    return dict(zip(values, table[0][:-1], strict=True)), any(row[-1] for row in table)


def sub_layers_above(sample: Mapping[str, float], tag: str, bound: float | None) -> list[int]:
    """The sub-layers whose `<tag>/layer_<k>` is above a bound, or not finite.

    Args:
        sample: Numbers by tag, as `AmaxGain.last`.
        tag: The tag of the largest over sub-layers.
        bound: None selects only sub-layers that are not finite.
    """
    layers = []
    for name, value in sample.items():
        prefix, _, number = name.rpartition("/layer_")
        # Written so that NaN counts as above.
        ordinary = value < float("inf") if bound is None else value <= bound
        if prefix == tag and number.isdigit() and not ordinary:
            layers.append(int(number))
    return sorted(layers)


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as spans: `0, 3 to 7, 9`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]} to {p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def largest_gradient(trainer: pl.Trainer) -> str | None:
    """The parameter whose gradient is the largest or not finite, and its share of the norm.

    Every process must call this: the norms of sharded gradients are reduced, and those of the
    stages of a pipeline are gathered. None if there are no gradients.
    """
    squares: list[tuple[str, float]] = []
    for name, parameter in trainer.lightning_module.named_parameters():
        if parameter.grad is not None:
            squares.append((name, _squared_norm(parameter)))
    stages = layout_of(trainer.strategy).gather_over_pipeline(squares)
    squares = [square for stage in stages for square in stage]
    if not squares:
        return None
    not_finite = [name for name, square in squares if not square < float("inf")]
    if not_finite:
        count = f"{len(not_finite)} of {len(squares)}"
        return f"{count} gradients not finite, the first in {not_finite[0]}"
    name, square = max(squares, key=lambda pair: pair[1])
    total = sum(other for _, other in squares)
    share = square / total if total else 0.0
    return f"largest gradient in {name} ({share:.0%} of the squared norm)"


def _squared_norm(parameter: Tensor) -> float:
    gradient, store = parameter.grad, row_store_of(parameter)
    assert gradient is not None
    if store is not None:
        norm = store.norm(torch.float32)
    else:
        norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return float(norm.double() ** 2)
