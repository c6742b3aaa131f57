"""Single-pass mHC (arXiv 2609.19969): the preceding sub-layer computes the pre mapping."""

from typing import Any

import torch
from torch import Tensor

from mhc_lightning.kernels import fuses_seams, merge_and_read, merge_streams, read_streams
from mhc_lightning.modules.connection import Unmerged
from mhc_lightning.modules.gated_hyper_connection import GatedHyperConnection
from mhc_lightning.modules.manifold_hyper_connection import ManifoldHyperConnection


class SinglePassHyperConnection(ManifoldHyperConnection):
    """mHC whose pre mapping is for the next sub-layer, so that one pass merges and reads.

    A sub-layer computes `new = residual · streams + post · F(carry · streams)`, where `carry` is
    the pre mapping of the preceding connection. The first sub-layer reads stream 0. The network is
    read out with the pre mapping of its last connection. The carry travels with the streams: call
    `read` and `write` (or `follow`) in order. Only the first connection can be called by itself.

    The arguments, and the start as the pre-norm residual network, are those of
    `ManifoldHyperConnection`.
    """

    replays = True

    def _reader(self) -> int:
        return self.layer_index + 1

    def read(self, streams: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Any]:
        """Aggregate with `carry` [..., n] and compute the mappings.

        Raises:
            ValueError: `carry` is missing, and this is not the first sub-layer.
        """
        if carry is None:
            carry = self._first_carry(streams)
        old_streams, u, mappings = read_streams(
            streams,
            *(self.phi, self.alpha, self.bias),
            num_iterations=self.sinkhorn_iterations,
            eps=self.eps,
            carry=carry,
        )
        shown = self.window(streams, mappings._replace(pre=carry))._replace(pre=carry)
        return u, (old_streams, shown, mappings.pre)

    def write(self, streams: Tensor, output: Tensor, state: Any) -> tuple[Tensor, Tensor | None]:
        """Merge, and return the pre mapping as the carry."""
        old_streams, mappings, carry = state
        return merge_streams(old_streams, output, mappings.residual, mappings.post), carry

    def follow(self, unmerged: Unmerged) -> tuple[Tensor, Tensor, Any]:
        """Merge and read in one pass if both connections are alike and the kernels can fuse it."""
        if type(unmerged.connection) is not type(self) or not fuses_seams(
            unmerged.streams, self.phi
        ):
            return super(GatedHyperConnection, self).follow(unmerged)
        old_streams, mappings, carry = unmerged.state
        streams, u, following = merge_and_read(
            old_streams,
            unmerged.output,
            mappings.residual,
            mappings.post,
            *(self.phi, self.alpha, self.bias),
            carry=carry,
            **self._rule(),
        )
        shown = self.window(streams, following._replace(pre=carry))._replace(pre=carry)
        return streams, u, (streams, shown, following.pre)

    def carry_like(self, streams: Tensor) -> Tensor:
        """An uninitialised carry [..., n]."""
        dtype = torch.float64 if streams.dtype == torch.float64 else torch.float32
        return streams.new_empty(streams.shape[:-1], dtype=dtype)

    def _first_carry(self, streams: Tensor) -> Tensor:
        if self.layer_index > 0:
            raise ValueError(
                f"sub-layer {self.layer_index} of a single-pass network needs the carry that the "
                "preceding sub-layer's write returned"
            )
        carry = self.carry_like(streams).zero_()
        carry[..., 0] = 1
        return carry
