"""The base of mHC and its variants: gates to read and write, projected from all streams."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_lightning.errors import UserError
from mhc_lightning.kernels import (
    StreamMappings,
    fuses_seams,
    merge_and_read,
    read_streams,
    stream_mappings,
)
from mhc_lightning.modules.connection import Connection, Unmerged
from mhc_lightning.modules.initialisation import whole_parameters

# The mHC paper gives an initialisation of alpha only. This logit is the choice of this package, and
# of mHC-lite's code: sub-layer k prefers to read stream k mod n. That breaks the streams' symmetry.
_READ_LOGIT = 1.0


class GatedHyperConnection(Connection):
    """n streams, read through σ, written through 2σ, and mixed by a variant's function of logits.

    A variant implements `mix`; the stream-sized operations are the kernels of mHC. A variant with
    doubly stochastic matrices starts as the pre-norm residual network:

    - `phi` is zero, so the mappings are static.
    - Every stream is written with weight one.
    - Streams start as copies, which a doubly stochastic matrix leaves equal. So a read differs from
      the residual network's in scale only, and the sub-layer's norm removes the scale.

    Args:
        dim: Width C of one stream.
        num_streams: Number of streams n, at least 1.
        layer_index: The number of the sub-layer in the network, from 0.
        mix_bias: The logits [m] that `mix` starts with; m may be any number.
        eps: Added to the mean square of the n·C values of a token, inside the square root.

    Attributes:
        phi: [n·C, 2n + m], columns in the order pre | post | logits of the residual.
        alpha: Gates [3] of the dynamic part, at first 0.01 as in the paper.
        bias: [2n + m].
    """

    replays = True

    def __init__(
        self,
        dim: int,
        num_streams: int,
        layer_index: int,
        mix_bias: Sequence[float],
        eps: float = 1e-20,
    ) -> None:
        super().__init__(dim, num_streams, layer_index)
        count = 2 * num_streams + len(mix_bias)
        self.eps = eps
        self._mix_bias = list(mix_bias)
        self.phi = self._coefficient_parameter(num_streams * dim, count)
        self.alpha = self._coefficient_parameter(3)
        self.bias = self._coefficient_parameter(count)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start static, with the symmetry between streams broken."""
        self._start(_READ_LOGIT, -_READ_LOGIT)

    def start_as_residual(self) -> None:
        """Start static, with read weights in the ratio of `reset_parameters` that sum to one.

        Raises:
            UserError: There is one stream: σ stays below one.
        """
        n = self.num_streams
        if n == 1:
            raise UserError(
                f"{type(self).__name__} reads a stream with a weight below one, so with"
                " num_streams=1 it cannot start as a residual connection; take at least 2 streams,"
                " or connection=residual or hc"
            )
        preferred, other = _sigmoid(_READ_LOGIT), _sigmoid(-_READ_LOGIT)
        total = preferred + (n - 1) * other
        self._start(_logit(preferred / total), _logit(other / total))

    def _start(self, preferred: float, other: float) -> None:
        """Fill the parameters, with the logits of reading one stream, and the others."""
        n = self.num_streams
        with torch.no_grad(), whole_parameters(self):
            self.phi.zero_()
            self.alpha.fill_(0.01)
            pre, post, logits = self.bias.tensor_split([n, 2 * n])
            pre.fill_(other)
            pre[self._reader() % n] = preferred
            post.zero_()
            logits.copy_(torch.tensor(self._mix_bias, dtype=logits.dtype))

    def _reader(self) -> int:
        """The sub-layer that reads with this connection's pre mapping."""
        return self.layer_index

    def mix(self, logits: Tensor) -> Tensor:
        """Mixing matrices [..., n, n] of logits [..., m], token by token.

        An implementation is differentiable, has no parameters, and keeps the logits' dtype, float32
        or float64.
        """
        raise TypeError(f"{type(self).__name__} does not implement mix()")

    def _rule(self) -> dict[str, Any]:
        """The kernels' arguments that are not parameters."""
        return {"mix": self.mix, "eps": self.eps}

    def mappings(self, streams: Tensor) -> StreamMappings:
        """Mappings for streams [..., n, C]."""
        return stream_mappings(streams, self.phi, self.alpha, self.bias, **self._rule())

    def read(self, streams: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Any]:
        """Compute mappings and the aggregated streams together."""
        old_streams, u, mappings = read_streams(
            streams, self.phi, self.alpha, self.bias, **self._rule()
        )
        # A hook may change what leaves the window, but the streams were read with this `pre`.
        return u, (old_streams, self.window(streams, mappings)._replace(pre=mappings.pre))

    def follow(self, unmerged: Unmerged) -> tuple[Tensor, Tensor, Any]:
        """Merge and read in one step if both connections are alike and the kernels can fuse it."""
        if type(unmerged.connection) is not type(self) or not fuses_seams(
            unmerged.streams, self.phi
        ):
            return super().follow(unmerged)
        old_streams, mappings = unmerged.state
        streams, u, following = merge_and_read(
            old_streams,
            unmerged.output,
            mappings.residual,
            mappings.post,
            *(self.phi, self.alpha, self.bias),
            **self._rule(),
        )
        shown = self.window(streams, following)._replace(pre=following.pre)
        return streams, u, (streams, shown)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def _logit(weight: float) -> float:
    return math.log(weight / (1 - weight))
