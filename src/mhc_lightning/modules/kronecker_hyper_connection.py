"""KromHC (arXiv 2601.21579): mixing matrices that are Kronecker products of small ones."""

from functools import reduce
from math import factorial

from torch import Tensor

from mhc_lightning.errors import UserError
from mhc_lightning.modules.gated_hyper_connection import GatedHyperConnection
from mhc_lightning.modules.permutations import MOST_PERMUTED, mixed_permutations, starting_logits


class KroneckerHyperConnection(GatedHyperConnection):
    """n streams mixed by Kronecker products of doubly stochastic matrices.

    Each prime factor i of n has one matrix, a convex combination of the i! permutations. Rows and
    columns sum to one to rounding, without iterations. There are Σ i! + 2n coefficients per token:
    12 for n = 4, where mHC has 24 and mHC-lite 32.

    Mixing starts as in its authors' code, with logit 0 for the identity and -8 for the others;
    reading and writing start as in `ManifoldHyperConnection`.

    Args:
        dim: Width C of one stream.
        num_streams: Number of streams n, a product of 2s and 3s, or 1.
        layer_index: The number of the sub-layer in the network, from 0.
        eps: Added to the mean square of the n·C values of a token, inside the square root.

    Attributes:
        factors: The prime factors of n, in ascending order, outermost first.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self, dim: int, num_streams: int = 4, layer_index: int = 0, eps: float = 1e-20
    ) -> None:
        factors = _prime_factors(num_streams)
        if factors and factors[-1] > MOST_PERMUTED:
            raise UserError(
                f"connection=krom mixes by all permutations of each prime factor of n, and"
                f" model.num_streams={num_streams} has the factor {factors[-1]};"
                " it has to be a product of 2s and 3s, such as 4, 6 or 8"
            )
        mix_bias = [logit for size in factors for logit in starting_logits(size)]
        super().__init__(dim, num_streams, layer_index, mix_bias, eps)
        self.factors = factors

    def mix(self, logits: Tensor) -> Tensor:
        """Doubly stochastic matrices [..., n, n] for logits [..., Σ i!]."""
        parts = logits.split([factorial(size) for size in self.factors], -1)
        matrices = list(map(mixed_permutations, parts, self.factors))
        return reduce(_product, matrices or [logits.new_ones(*logits.shape[:-1], 1, 1)])


def _product(outer: Tensor, inner: Tensor) -> Tensor:
    """The Kronecker product of [..., a, a] and [..., b, b]."""
    product = outer[..., :, None, :, None] * inner[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2, -1)


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        if number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        else:
            divisor += 1
    return factors
