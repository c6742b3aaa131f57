"""mHC-lite (arXiv 2601.05732): mixing matrices that are doubly stochastic by construction."""

from torch import Tensor

from mhc_lightning.errors import UserError
from mhc_lightning.modules.gated_hyper_connection import GatedHyperConnection
from mhc_lightning.modules.permutations import MOST_PERMUTED, mixed_permutations, starting_logits


class PermutationHyperConnection(GatedHyperConnection):
    """n streams mixed by convex combinations of all n! permutations.

    Rows and columns sum to one to rounding, without iterations. There are n! + 2n coefficients per
    token; n²·n! temporary values turn them into the matrix.

    Mixing starts as in its authors' code, with logit 0 for the identity and -8 for the others.
    Reading and writing start as in `ManifoldHyperConnection`. The authors' code writes with unequal
    weights instead, so their network does not start as the residual network.

    Args:
        dim: Width C of one stream.
        num_streams: Number of streams n, from 1 to 4.
        layer_index: The number of the sub-layer in the network, from 0.
        eps: Added to the mean square of the n·C values of a token, inside the square root.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self, dim: int, num_streams: int = 4, layer_index: int = 0, eps: float = 1e-20
    ) -> None:
        if num_streams > MOST_PERMUTED:
            raise UserError(
                f"connection=mhc_lite mixes by all permutations (24 of 4 streams, 120 of 5), so"
                f" model.num_streams is at most {MOST_PERMUTED}, not {num_streams};"
                " connection=krom takes more"
            )
        mix_bias = starting_logits(num_streams) if num_streams > 0 else []
        super().__init__(dim, num_streams, layer_index, mix_bias, eps)

    def mix(self, logits: Tensor) -> Tensor:
        """Doubly stochastic matrices [..., n, n] for logits [..., n!]."""
        return mixed_permutations(logits, self.num_streams)
