"""The operands of merging for one sub-layer and reading for the next as one step.

Shapes: T tokens, n streams of width C, K coefficients (n² + 2n, or 2n + m with a `Mix`).
"""

from typing import NamedTuple

from torch import Tensor

from mhc_lightning.kernels.read.operands import ReadOperands


class MergeReadOperands(NamedTuple):
    """The tensors of which merging and reading have gradients.

    Attributes:
        streams: [T, n, C].
        output: The sub-layer's output [T, C].
        residual: Its mixing matrices [T, n, n].
        post: Its write weights [T, n].
        phi: The next connection's projection [n·C, K].
        alpha: The next connection's gates [3].
        bias: The next connection's biases [K].
        carry: Weights [T, n] to read the new streams with; None stands for their own `pre`.
    """

    streams: Tensor
    output: Tensor
    residual: Tensor
    post: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor
    carry: Tensor | None

    @property
    def merge(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The operands of merging."""
        return self[:4]

    def read(self, new: Tensor) -> ReadOperands:
        """The operands of reading the new streams [T, n, C]."""
        return ReadOperands(new, *self[4:])


class MergeReadResults(NamedTuple):
    """The new streams [T, n, C], then the fields of `ReadResults`."""

    new: Tensor
    read: Tensor
    pre: Tensor
    post: Tensor
    residual: Tensor
    raw: Tensor
    inverse_rms: Tensor


class MergeReadGrads(NamedTuple):
    """Gradients of `MergeReadOperands`; None for a carry that nothing was read with."""

    streams: Tensor
    output: Tensor
    residual: Tensor
    post: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor
    carry: Tensor | None
