"""How a connection's raw coefficients become mappings: the one thing that sets HC and mHC apart."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Mix = Callable[[Tensor], Tensor]
"""Makes mixing matrices [..., n, n] of a token's logits [..., m], any number of them, in torch."""


class Rule(NamedTuple):
    """The rule and its constants.

    Attributes:
        name: ``"sinkhorn"``: mHC, all streams of a token normalised and projected together, then
            σ, 2σ and Sinkhorn-Knopp (arXiv 2512.24880, eqs. 7–9). ``"gates"``: the same but for
            the last; logits of any number are left as they are, for a ``Mix``. ``"tanh"`` and
            ``"linear"``: HC (eq. 5), each stream by itself, with or without tanh.
        num_iterations: Sinkhorn iterations, at least 1.
        eps: Added to the mean square, inside the square root.
    """

    name: str
    num_iterations: int
    eps: float

    @property
    def per_stream(self) -> bool:
        """Whether each stream has a norm and raw coefficients of its own."""
        return self.name in ("tanh", "linear")

    @property
    def tanh(self) -> bool:
        """Whether the dynamic part is bounded by tanh."""
        return self.name == "tanh"
