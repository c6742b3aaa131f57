"""The record of one connection's mappings, the one thing that observers read."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class StreamMappings(NamedTuple):
    """The three mappings of one residual sub-layer, for every token.

    They act as ``new[i] = Σ_j residual[i, j] · streams[j] + post[i] · F(Σ_j pre[j] · streams[j])``
    (arXiv 2512.24880, eq. 3).

    Attributes:
        pre: Read weights [..., n], float32.
        post: Write weights [..., n], float32.
        residual: Stream mixing matrices [..., n, n], float32.
    """

    pre: Tensor
    post: Tensor
    residual: Tensor


class MappingGrads(NamedTuple):
    """Gradients of the three mappings, shaped like them; None where nothing comes back."""

    pre: Tensor | None
    post: Tensor | None
    residual: Tensor | None


merge_observers: list[Callable[[Tensor, Tensor], None]] = []
"""Called with (residual mapping, merged streams) of every merge, outside of compiled programs."""


def note_merge(residual: Tensor, merged: Tensor) -> None:
    """Tell the observers which streams came of mixing with a residual mapping."""
    if not torch.compiler.is_compiling():  # a compiled program has no guard on the list
        for observer in merge_observers:
            observer(residual, merged)
