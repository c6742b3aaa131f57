"""The record of a connection's mappings, and the rule that makes mappings of raw coefficients."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Mix = Callable[[Tensor], Tensor]
"""Makes mixing matrices [..., n, n] of a token's logits [..., m], any number of them, in torch."""


class StreamMappings(NamedTuple):
    """The three mappings of one residual sub-layer, for every token.

    They act as `new[i] = Σ_j residual[i, j] · streams[j] + post[i] · F(Σ_j pre[j] · streams[j])`
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
    """Gradients of the three mappings, of the same shapes; None for a mapping without gradient."""

    pre: Tensor | None
    post: Tensor | None
    residual: Tensor | None

    def plus_pre(self, more: Tensor) -> "MappingGrads":
        """The gradients with `more` [T, n] added to that of `pre`."""
        return self._replace(pre=more if self.pre is None else self.pre + more)


class MappingRule(NamedTuple):
    """The rule that makes mappings of raw coefficients, and its constants.

    Attributes:
        name: `"sinkhorn"` is mHC: all streams of a token are normalised and projected together, and
            pass through σ, 2σ and Sinkhorn-Knopp (arXiv 2512.24880, eqs. 7–9). `"gates"` is the
            same without Sinkhorn-Knopp: the logits, of any number, go to a `Mix` unchanged.
            `"tanh"` and `"linear"` are HC (eq. 5): each stream by itself, with or without tanh.
        num_iterations: Sinkhorn iterations, at least 1.
        eps: Added to the mean square, inside the square root.
    """

    name: str
    num_iterations: int
    eps: float

    @property
    def per_stream(self) -> bool:
        """True if each stream has a norm and raw coefficients of its own."""
        return self.name in ("tanh", "linear")

    @property
    def tanh(self) -> bool:
        """True if the dynamic part is bounded by tanh."""
        return self.name == "tanh"
