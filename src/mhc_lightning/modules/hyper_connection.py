"""Hyper-Connections (arXiv 2409.19606), unconstrained, static or dynamic."""

from typing import Any

import torch
from torch import Tensor

from mhc_lightning.kernels import (
    StreamMappings,
    hyper_mappings,
    read_hyper_streams,
)
from mhc_lightning.modules.connection import Connection
from mhc_lightning.modules.initialisation import whole_parameters


class HyperConnection(Connection):
    """n streams mixed by learned, unconstrained mappings.

    The initialisation is the authors': sub-layer k reads stream k mod n, writes to all streams with
    weight one and mixes none of them. So the network starts exactly as the pre-norm residual
    network. With n = 1 the connection is a learned scaling of the residual and of the output.

    Args:
        dim: Width C of one stream.
        num_streams: Number of streams n, at least 1.
        layer_index: The number of the sub-layer in the network, from 0.
        dynamic: Whether the mappings depend on the token.
        tanh: Whether the dynamic part is bounded by tanh.
        eps: Added to the mean square of a stream, inside the square root.

    Attributes:
        phi: Dynamic projections [C, n + 2] (pre | post | residual); None if static.
        alpha: Scales [2] of pre and residual, and of post, at first 0.01; None if static.
        bias: Static mappings [n² + 2n] (pre | post | residual, row-major).
    """

    replays = True

    def __init__(
        self,
        dim: int,
        num_streams: int = 4,
        layer_index: int = 0,
        dynamic: bool = True,
        tanh: bool = True,
        eps: float = 1e-20,
    ) -> None:
        super().__init__(dim, num_streams, layer_index)
        n = num_streams
        self.dynamic = dynamic
        self.tanh = tanh
        self.eps = eps
        self.bias = self._coefficient_parameter(n * n + 2 * n)
        self.phi = self._coefficient_parameter(dim, n + 2) if dynamic else None
        self.alpha = self._coefficient_parameter(2) if dynamic else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation: the pre-norm residual network."""
        n = self.num_streams
        with torch.no_grad(), whole_parameters(self):
            pre, post, residual = self.bias.split([n, n, n * n])
            pre.zero_()
            pre[self.layer_index % n] = 1
            post.fill_(1)
            residual.copy_(torch.eye(n, dtype=residual.dtype).flatten())
            if self.phi is not None and self.alpha is not None:
                self.phi.zero_()
                self.alpha.fill_(0.01)

    def start_as_residual(self) -> None:
        """Reset: the authors' initialisation reads one stream, with weight one."""
        self.reset_parameters()

    def mappings(self, streams: Tensor) -> StreamMappings:
        """Unconstrained mappings for streams [..., n, C]."""
        if self.phi is not None and self.alpha is not None:
            return hyper_mappings(streams, self.phi, self.alpha, self.bias, self.tanh, self.eps)
        n = self.num_streams
        pre, post, residual = self.bias.split([n, n, n * n])
        leading = streams.shape[:-2]
        return StreamMappings(
            pre.expand(*leading, n),
            post.expand(*leading, n),
            residual.view(n, n).expand(*leading, n, n),
        )

    def read(self, streams: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Any]:
        """Compute mappings and the aggregated streams together."""
        if self.phi is None or self.alpha is None:
            return super().read(streams, carry)
        old_streams, u, mappings = read_hyper_streams(
            streams, self.phi, self.alpha, self.bias, self.tanh, self.eps
        )
        # A hook may change what leaves the window, but the streams were read with this `pre`.
        return u, (old_streams, self.window(streams, mappings)._replace(pre=mappings.pre))
