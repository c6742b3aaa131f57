"""Observers of merges: instruments that see the streams of models outside this package."""

from collections.abc import Callable

import torch
from torch import Tensor

merge_observers: list[Callable[[Tensor, Tensor], None]] = []
"""Called with (residual mapping, merged streams) of every merge, outside of compiled programs."""


def note_merge(residual: Tensor, merged: Tensor) -> None:
    """Tell the observers of a merge: its residual mapping, and the merged streams."""
    if not torch.compiler.is_compiling():  # a compiled program has no guard on the list
        for observer in merge_observers:
            observer(residual, merged)
