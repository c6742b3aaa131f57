"""What an alarm shows for itself: the sub-layers and the gradient that stand out."""

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mhc_lightning.strategies.layout import layout_of


def sub_layers_above(last: Mapping[str, float], tag: str, bound: float | None) -> list[int]:
    """The sub-layers whose ``<tag>/layer_<k>`` is above a bound, or not finite.

    Args:
        last: A sample by tag, as `AmaxGain.last`.
        tag: The largest over sub-layers.
        bound: None looks for those that are not finite alone.
    """
    found = []
    for name, value in last.items():
        before, _, number = name.rpartition("/layer_")
        # Written so that NaN counts as above.
        ordinary = value < float("inf") if bound is None else value <= bound
        if before == tag and number.isdigit() and not ordinary:
            found.append(int(number))
    return sorted(found)


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers for people: ``0, 3 to 7, 9``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]} to {p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def largest_gradient(trainer: pl.Trainer) -> str | None:
    """Which parameter's gradient is the largest or not finite, and its part of the whole.

    Every process must call this: sharded gradients are summed up, and the stages of a pipeline
    tell each other. None if there are no gradients.
    """
    squares: list[tuple[str, float]] = []
    for name, parameter in trainer.lightning_module.named_parameters():
        if parameter.grad is not None:
            squares.append((name, _square(parameter.grad)))
    stages = layout_of(trainer.strategy).gather_over_pipeline(squares)
    squares = [square for stage in stages for square in stage]
    if not squares:
        return None
    broken = [name for name, square in squares if not square < float("inf")]
    if broken:
        return f"{len(broken)} of {len(squares)} gradients not finite, that of {broken[0]} for one"
    name, square = max(squares, key=lambda pair: pair[1])
    whole = sum(other for _, other in squares)
    share = square / whole if whole else 0.0
    return f"largest gradient in {name} ({share:.0%} of the squared norm)"


def _square(gradient: Tensor) -> float:
    norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return float(norm.double() ** 2)
