"""Streams that are read and written, and not mixed (iHC; the ablation "Identity HC" of mHC)."""

import torch
from torch import Tensor

from mhc_lightning.modules.gated_hyper_connection import GatedHyperConnection


class IdentityHyperConnection(GatedHyperConnection):
    """n streams with the identity as mixing matrix: only the gates to read and write are learned.

    Every gain of the residual path is exactly one, at any depth. There are 2n coefficients per
    token. Reading and writing start as in `ManifoldHyperConnection`. This start is the choice of
    this package: publications state only that trained models read near 1/n and write near 1.

    Args:
        dim: Width C of one stream.
        num_streams: Number of streams n, at least 1.
        layer_index: The number of the sub-layer in the network, from 0.
        eps: Added to the mean square of the n·C values of a token, inside the square root.
    """

    def __init__(
        self, dim: int, num_streams: int = 4, layer_index: int = 0, eps: float = 1e-20
    ) -> None:
        super().__init__(dim, num_streams, layer_index, [], eps)

    def mix(self, logits: Tensor) -> Tensor:
        """The identity [..., n, n], for logits [..., 0]."""
        eye = torch.eye(self.num_streams, dtype=logits.dtype, device=logits.device)
        return eye.expand(*logits.shape[:-1], -1, -1)
