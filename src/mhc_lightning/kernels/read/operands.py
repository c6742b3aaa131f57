"""The operands of reading, and what its backward pass takes beside them.

Shapes: T tokens, n streams of width C. K is n² + 2n, or 2n + m where a `Mix` makes the matrices of
m logits. With coefficients per stream (HC), phi is [C, n + 2] and there are T·n rows, else T.
"""

from typing import NamedTuple

from torch import Tensor


class ReadOperands(NamedTuple):
    """The tensors of which reading has gradients.

    Attributes:
        streams: [T, n, C].
        phi: The projection [n·C, K], or [C, n + 2].
        alpha: Gates [3], or [2].
        bias: [K], or [n² + 2n].
        carry: Weights [T, n] to aggregate with; None stands for the new mappings' `pre`.
    """

    streams: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor
    carry: Tensor | None


class ReadResults(NamedTuple):
    """The results of reading.

    Attributes:
        read: The sub-layer's input [T, C], empty if it is not wanted.
        pre: Read weights [T, n].
        post: Write weights [T, n].
        residual: Mixing matrices [T, n, n], or a `Mix`'s logits [T, m].
        raw: Products with phi, not divided by the norm [K, T], or [n + 2, T·n].
        inverse_rms: Inverse norms of the rows [T], or [T·n].
    """

    read: Tensor
    pre: Tensor
    post: Tensor
    residual: Tensor
    raw: Tensor
    inverse_rms: Tensor


class Projection(NamedTuple):
    """The results of reading that its backward pass needs; shapes as in `ReadResults`."""

    pre: Tensor
    raw: Tensor
    inverse_rms: Tensor


class ReadNeeds(NamedTuple):
    """For each gradient that can be left out, True if it is needed."""

    streams: bool
    phi: bool
    carry: bool


class ReadGrads(NamedTuple):
    """Gradients of `ReadOperands`, None if not needed or if there is no such operand."""

    streams: Tensor | None
    phi: Tensor | None
    alpha: Tensor
    bias: Tensor
    carry: Tensor | None
