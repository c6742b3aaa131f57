"""The base of all residual connections: reading from n streams, and writing to them."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.kernels import StreamMappings, aggregate_streams, merge_streams
from mhc_lightning.modules.limits import require_at_least
from mhc_lightning.modules.precision import KeepsFloat32
from mhc_lightning.modules.recompute import note_output, note_read

Sublayer = Callable[[Tensor], Tensor]  # [..., C] -> [..., C], its pre-norm included
Merged = tuple[Tensor, Tensor | None]  # streams [..., n, C] and the carry for the next `read`


class MappingsWindow(nn.Module):
    """The one window for observers: an identity through which all mappings pass.

    A forward hook on the window sees the mappings. Observers accept any module that returns a
    `StreamMappings`, so other projects can use this class or their own.
    """

    def forward(self, streams: Tensor, mappings: StreamMappings) -> StreamMappings:
        """Return `mappings`, which act on `streams` [..., n, C]."""
        return mappings


class Unmerged(NamedTuple):
    """A sub-layer's output before it is merged: the next connection can merge while it reads.

    Attributes:
        connection: The connection whose `write` is due.
        streams: The streams [..., n, C] that were read.
        output: The sub-layer's output [..., C].
        state: The state that `read` returned for `write`.
    """

    connection: "Connection"
    streams: Tensor
    output: Tensor
    state: Any

    def merge(self) -> Merged:
        """The new streams, and the carry for the next `read`."""
        return self.connection.write(self.streams, self.output, self.state)


class Connection(KeepsFloat32):
    """Base of all connections: `streams = connection(streams, sublayer)`.

    A new variant implements `mappings`. It overrides `read`, `write` or `follow` if it fuses steps
    or reads and writes differently. A variant with the gates of mHC derives from
    `GatedHyperConnection` and implements `mix` alone.

    A `Transformer` calls a connection's `run`, not the connection itself. So hooks belong on the
    connection's `window`. Parameters stay float32 when a model is cast to a lower precision, and
    become float64 with `.double()`.

    Args:
        dim: Width C of one stream.
        num_streams: Number of streams n, at least 1.
        layer_index: The number of the sub-layer in the network, from 0.

    Attributes:
        replays: True if `aggregate_streams` and `merge_streams` repeat `read` and `write` when
            given the mappings in the state of `read` (its second item). Recomputation then
            rebuilds the streams; it keeps the streams of other connections. A class that overrides
            `read`, `write` or `follow` does not inherit this attribute.

    Raises:
        UserError: An argument is out of range.
    """

    replays: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Clear `replays` in a class with its own `read`, `write` or `follow`, unless it is set."""
        super().__init_subclass__(**kwargs)
        if not vars(cls).keys().isdisjoint({"read", "write", "follow"}):
            cls.replays = vars(cls).get("replays", False)

    def __init__(self, dim: int, num_streams: int, layer_index: int) -> None:
        super().__init__()
        require_at_least(dim=(dim, 1), num_streams=(num_streams, 1), layer_index=(layer_index, 0))
        self.dim = dim
        self.num_streams = num_streams
        self.layer_index = layer_index
        self.window = MappingsWindow()

    def reset_parameters(self) -> None:
        """Initialise the parameters, within `whole_parameters`; without parameters, do nothing.

        Raises:
            TypeError: The class has parameters and does not initialise them.
        """
        if next(self.parameters(recurse=False), None) is not None:
            raise TypeError(f"{type(self).__name__} does not implement reset_parameters()")

    def start_as_residual(self) -> None:
        """Set the parameters so that streams which are copies stay so, as one residual stream.

        Afterwards, whatever the token: read weights sum to one, each row of the mixing matrix sums
        to one, and write weights are one. So a sub-layer reads exactly `x`, and each stream becomes
        `x + F(x)`. Read weights differ between streams, and between sub-layers: this is what
        makes the streams differ once they are trained.

        Raises:
            UserError: The class does not implement this, or its coefficients cannot have these
                values.
        """
        raise UserError(
            f"{type(self).__name__} does not implement start_as_residual(), by which a connection"
            " takes the place of an ordinary residual connection in a trained network; see"
            " docs/extend/connection.md"
        )

    def mappings(self, streams: Tensor) -> StreamMappings:
        """The mappings [..., n], [..., n], [..., n, n] for streams [..., n, C]."""
        raise TypeError(f"{type(self).__name__} does not implement mappings()")

    def read(self, streams: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Any]:
        """Give a sub-layer its input.

        Args:
            streams: [..., n, C].
            carry: The carry that the preceding sub-layer's `write` returned.

        Returns:
            The sub-layer's input [..., C], and the state that `write` needs.
        """
        mappings = self.mappings(streams)
        # A hook may change what leaves the window, but the streams were read with this `pre`.
        shown = self.window(streams, mappings)._replace(pre=mappings.pre)
        return aggregate_streams(streams, mappings.pre), (streams, shown)

    def write(self, streams: Tensor, output: Tensor, state: Any) -> Merged:
        """Merge a sub-layer's output [..., C] into the streams [..., n, C].

        Returns:
            The new streams, and the carry for the next sub-layer's `read`.
        """
        old_streams, mappings = state
        return merge_streams(old_streams, output, mappings.residual, mappings.post), None

    def carry_like(self, streams: Tensor) -> Tensor | None:
        """An uninitialised carry as `write` returns it beside streams [..., n, C], or None."""
        return None

    def follow(self, unmerged: Unmerged) -> tuple[Tensor, Tensor, Any]:
        """Merge the preceding sub-layer's output, then read; a variant may fuse the two.

        Returns:
            The merged streams [..., n, C], this sub-layer's input [..., C], and the state that
            `write` needs.
        """
        streams, carry = unmerged.merge()
        u, state = self.read(streams, carry)
        return streams, u, state

    def run(
        self, source: Tensor | Unmerged, sublayer: Sublayer, carry: Tensor | None = None
    ) -> Unmerged:
        """Read and apply a sub-layer, and leave its output unmerged.

        Args:
            source: Streams [..., n, C], or the unmerged output of the preceding sub-layer.
            sublayer: [..., C] -> [..., C], its pre-norm included.
            carry: Beside streams, the carry that the preceding sub-layer's `write` returned.
        """
        if isinstance(source, Unmerged):
            streams, u, state = self.follow(source)
        else:
            streams = source
            u, state = self.read(streams, carry)
        note_read(streams, u, state[1] if self.replays else None)
        output = sublayer(u)
        note_output(output)
        return Unmerged(self, streams, output, state)

    def forward(self, streams: Tensor, sublayer: Sublayer) -> Tensor:
        """Read, apply `sublayer` ([..., C] -> [..., C], its pre-norm included), write."""
        return self.run(streams, sublayer).merge()[0]

    def extra_repr(self) -> str:
        """The sizes, for a printed model."""
        return f"dim={self.dim}, num_streams={self.num_streams}, layer_index={self.layer_index}"

    def _coefficient_parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter, float32 even under a lower default precision."""
        double = torch.get_default_dtype() == torch.float64
        return nn.Parameter(torch.empty(shape, dtype=torch.float64 if double else torch.float32))
