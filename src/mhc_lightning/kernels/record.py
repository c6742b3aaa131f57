"""The record of one connection's mappings, the one thing that observers read."""

from typing import NamedTuple

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
