"""Manifold-Constrained Hyper-Connections (arXiv 2512.24880)."""

from typing import Any

import torch
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.kernels import (
    StreamMappings,
    fuses_seams,
    merge_and_read,
    read_streams,
    stream_mappings,
)
from mhc_lightning.modules.connection import Connection, Unmerged

# The paper gives no initialisation but alpha's. These logits are this package's choice: reading
# prefers stream k mod n in sub-layer k, which breaks the symmetry between streams; mixing starts
# close to the identity, yet far enough from it for every entry to receive a gradient.
_READ_LOGIT = 1.0
_MIX_LOGIT = -6.0


class ManifoldHyperConnection(Connection):
    """n streams mixed by doubly stochastic matrices.

    At initialisation ``phi`` is zero, so the mappings are static: every stream is written with
    weight one, and since streams start as copies and a doubly stochastic matrix leaves equal
    streams equal, the network computes exactly what the pre-norm residual network does (a read
    scales the sub-layer's input, which its norm removes).

    Args:
        dim: Width C of one stream.
        num_streams: Number of streams n, at least 1; with n = 1 the mixing matrix is 1.
        layer_index: Which sub-layer this connects, from 0.
        sinkhorn_iterations: Column-then-row normalisations, at least 1.
        eps: Added to the mean square of the n·C values of a token, inside the square root.

    Attributes:
        phi: [n·C, n² + 2n], columns in the order pre | post | residual (row-major).
        alpha: Gates [3] of the dynamic part, at first 0.01 as in the paper.
        bias: [n² + 2n].
    """

    replays = True

    def __init__(
        self,
        dim: int,
        num_streams: int = 4,
        layer_index: int = 0,
        sinkhorn_iterations: int = 20,
        eps: float = 1e-20,
    ) -> None:
        super().__init__(dim, num_streams, layer_index)
        if sinkhorn_iterations < 1:
            raise UserError(
                f"connection.sinkhorn_iterations must be at least 1, not {sinkhorn_iterations}"
            )
        n = num_streams
        self.sinkhorn_iterations = sinkhorn_iterations
        self.eps = eps
        self.phi = self._coefficient_parameter(n * dim, n * n + 2 * n)
        self.alpha = self._coefficient_parameter(3)
        self.bias = self._coefficient_parameter(n * n + 2 * n)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the pre-norm residual network, with the symmetry between streams broken."""
        n = self.num_streams
        with torch.no_grad():
            nn.init.zeros_(self.phi)
            nn.init.constant_(self.alpha, 0.01)
            pre, post, residual = self.bias.split([n, n, n * n])
            pre.fill_(-_READ_LOGIT)
            pre[self.layer_index % n] = _READ_LOGIT
            nn.init.zeros_(post)
            residual.copy_(_MIX_LOGIT * (1 - torch.eye(n, dtype=residual.dtype)).flatten())

    def mappings(self, streams: Tensor) -> StreamMappings:
        """Mappings for streams [..., n, C]; the residual one is doubly stochastic."""
        return stream_mappings(
            streams, self.phi, self.alpha, self.bias, self.sinkhorn_iterations, self.eps
        )

    def read(self, streams: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Any]:
        """Compute mappings and the aggregated streams together."""
        kept, u, mappings = read_streams(
            streams, self.phi, self.alpha, self.bias, self.sinkhorn_iterations, self.eps
        )
        # Whatever leaves the window, the streams were read with this.
        return u, (kept, self.window(streams, mappings)._replace(pre=mappings.pre))

    def follow(self, before: Unmerged) -> tuple[Tensor, Tensor, Any]:
        """One step across the seam where both sides are mHC and the kernels can fuse it."""
        if type(before.connection) is not type(self) or not fuses_seams(before.streams, self.phi):
            return super().follow(before)
        kept, mappings = before.state
        streams, u, following = merge_and_read(
            kept,
            before.output,
            mappings.residual,
            mappings.post,
            *(self.phi, self.alpha, self.bias),
            num_iterations=self.sinkhorn_iterations,
            eps=self.eps,
        )
        shown = self.window(streams, following)._replace(pre=following.pre)
        return streams, u, (streams, shown)
