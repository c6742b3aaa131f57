"""Ways to initialise mHC, as connections that differ from the package's in that alone.

The mHC paper states one thing, alpha = 0.01, which all of them keep.
"""

import math

import torch
from torch import Tensor, nn

from mhc_lightning.modules import ManifoldHyperConnection


class _Start(ManifoldHyperConnection):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        n = self.num_streams
        pre, post, logits = self.bias.detach().split([n, n, n * n])
        self.change(pre, post, logits.view(n, n), self.phi.detach())

    def change(self, pre: Tensor, post: Tensor, mix: Tensor, phi: Tensor) -> None:
        """Change the package's start in place: biases [n], [n], [n, n] and phi [n·C, n² + 2n]."""
        raise TypeError(f"{type(self).__name__} does not implement change()")

    def normal(self, phi: Tensor, std: float) -> None:
        """Random projections, others in every sub-layer and the same in every run."""
        generator = torch.Generator().manual_seed(self.layer_index)
        values = torch.empty(phi.shape).normal_(std=std, generator=generator)
        phi.copy_(values)


class Symmetric(_Start):
    """No stream is preferred anywhere: all are read, written and mixed alike."""

    def change(self, pre: Tensor, post: Tensor, mix: Tensor, phi: Tensor) -> None:
        """Read logits 0 in place of ±1."""
        nn.init.zeros_(pre)


class StrongMixing(_Start):
    """Mixing logits 0 and -3 in place of 0 and -6: 0.87 on the diagonal at n = 4."""

    def change(self, pre: Tensor, post: Tensor, mix: Tensor, phi: Tensor) -> None:
        """The diagonal stays."""
        mix.fill_(-3.0).fill_diagonal_(0.0)


class UniformMixing(_Start):
    """Every sub-layer replaces all streams by their mean: mixing logits 0."""

    def change(self, pre: Tensor, post: Tensor, mix: Tensor, phi: Tensor) -> None:
        """Reads stay broken."""
        nn.init.zeros_(mix)


class SignedWrites(_Start):
    """As in mHC-lite's code: writes prefer the stream that is read (logits ±1); mixing 0 and -8."""

    def change(self, pre: Tensor, post: Tensor, mix: Tensor, phi: Tensor) -> None:
        """Writes and mixing."""
        post.copy_(pre)
        mix.fill_(-8.0).fill_diagonal_(0.0)


class SignedWritesStrongMixing(_Start):
    """Writes prefer the stream that is read (logits ±1), and streams mix: logits 0 and -3."""

    def change(self, pre: Tensor, post: Tensor, mix: Tensor, phi: Tensor) -> None:
        """Writes and mixing."""
        post.copy_(pre)
        mix.fill_(-3.0).fill_diagonal_(0.0)


class OneStreamReads(_Start):
    """As HC starts, as nearly as σ can: reads 0.98 of one stream, 0.02 of the others."""

    def change(self, pre: Tensor, post: Tensor, mix: Tensor, phi: Tensor) -> None:
        """Read logits ±4 in place of ±1."""
        pre.mul_(4)


class XavierProjection(_Start):
    """As in Megatron-core's: biases 0, so uniform mixing, and Xavier-normal projections."""

    def change(self, pre: Tensor, post: Tensor, mix: Tensor, phi: Tensor) -> None:
        """Only phi breaks the symmetry."""
        nn.init.zeros_(pre)
        nn.init.zeros_(mix)
        self.normal(phi, math.sqrt(2 / sum(phi.shape)))


class SmallProjection(_Start):
    """As in implementations for MindSpore: reads of 1/4, mixing logits 0 and -5, phi ~ N(0, 1e-4).

    1e-4 is taken for the variance.
    """

    def change(self, pre: Tensor, post: Tensor, mix: Tensor, phi: Tensor) -> None:
        """Only phi breaks the symmetry."""
        pre.fill_(-math.log(3))
        mix.fill_(-5.0).fill_diagonal_(0.0)
        self.normal(phi, 1e-2)
