"""Manifold-Constrained Hyper-Connections (arXiv 2512.24880)."""

from typing import Any

from mhc_lightning.errors import UserError
from mhc_lightning.modules.gated_hyper_connection import GatedHyperConnection

# This package's choice: mixing starts close to the identity, yet far enough from it that every
# entry gets a gradient.
_MIX_LOGIT = -6.0


class ManifoldHyperConnection(GatedHyperConnection):
    """n streams mixed by doubly stochastic matrices, projected by Sinkhorn-Knopp on chip.

    Rows sum to one to rounding; columns do as far as the iterations have converged.

    Args:
        dim: Width C of one stream.
        num_streams: Number of streams n, at least 1; with n = 1 the mixing matrix is 1.
        layer_index: The number of the sub-layer in the network, from 0.
        sinkhorn_iterations: Column-then-row normalisations, at least 1.
        eps: Added to the mean square of the n·C values of a token, inside the square root.

    Attributes:
        phi: [n·C, n² + 2n], columns in the order pre | post | residual (row-major).
        alpha: Gates [3] of the dynamic part, at first 0.01 as in the paper.
        bias: [n² + 2n].
    """

    def __init__(
        self,
        dim: int,
        num_streams: int = 4,
        layer_index: int = 0,
        sinkhorn_iterations: int = 20,
        eps: float = 1e-20,
    ) -> None:
        if sinkhorn_iterations < 1:
            raise UserError(
                f"connection.sinkhorn_iterations must be at least 1, not {sinkhorn_iterations}"
            )
        n = range(num_streams)
        mix_bias = [0.0 if i == j else _MIX_LOGIT for i in n for j in n]
        super().__init__(dim, num_streams, layer_index, mix_bias, eps)
        self.sinkhorn_iterations = sinkhorn_iterations

    def _rule(self) -> dict[str, Any]:
        return {"num_iterations": self.sinkhorn_iterations, "eps": self.eps}
