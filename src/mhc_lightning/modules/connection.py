"""What every residual connection is: a way to read from n streams and a way to write to them."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mhc_lightning.kernels import StreamMappings, aggregate_streams, merge_streams
from mhc_lightning.modules.limits import require_at_least
from mhc_lightning.modules.precision import KeepsFloat32
from mhc_lightning.modules.recompute import note_output, note_read

Sublayer = Callable[[Tensor], Tensor]  # [..., C] -> [..., C], its pre-norm included
Merged = tuple[Tensor, Tensor | None]  # streams [..., n, C] and the carry for the next `read`


class MappingsWindow(nn.Module):
    """The one window for observers: an identity through which every record of mappings passes.

    Put a forward hook on it to see them. Any module that returns a ``StreamMappings`` serves the
    same observers, so other projects can use this class, or their own.
    """

    def forward(self, streams: Tensor, mappings: StreamMappings) -> StreamMappings:
        """Return ``mappings``; ``streams`` [..., n, C] are what they act on."""
        return mappings


class Unmerged(NamedTuple):
    """A sub-layer's output before it is merged: the next connection may merge while it reads.

    Attributes:
        connection: The connection whose ``write`` is due.
        streams: [..., n, C], as they were read.
        output: The sub-layer's output [..., C].
        state: What ``read`` returned for ``write``.
    """

    connection: "Connection"
    streams: Tensor
    output: Tensor
    state: Any

    def merge(self) -> Merged:
        """The new streams, and the carry for the next ``read``."""
        return self.connection.write(self.streams, self.output, self.state)


class Connection(KeepsFloat32):
    """Base of all connections: ``streams = connection(streams, sublayer)``.

    A new variant implements ``mappings``, and ``read``, ``write`` or ``follow`` where it does more
    in one step, or does it differently. With the gates of mHC it derives from
    ``GatedHyperConnection`` and implements ``mix`` alone.
    Within a ``Transformer`` it is not called but read and written: hooks belong on its ``window``.
    Its parameters stay float32 when a model is cast to a lower precision, and become float64 with
    ``.double()``.

    Args:
        dim: Width C of one stream.
        num_streams: Number of streams n, at least 1.
        layer_index: Which sub-layer of the network this connects, from 0.

    Attributes:
        replays: Whether ``aggregate_streams`` and ``merge_streams`` with the record that is second
            in ``read``'s state repeat what this connection reads and writes. Recomputation then
            rebuilds its streams; it keeps those of other connections. Not inherited by a class
            that reads or writes in its own way.

    Raises:
        UserError: If an argument is out of range.
    """

    replays: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A read or write of its own may not be what is replayed, unless the class says so."""
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
        """Initialise the parameters, as they are in `whole_parameters`; without any, do nothing.

        Raises:
            TypeError: There are parameters, and the class does not say how they start.
        """
        if next(self.parameters(recurse=False), None) is not None:
            raise TypeError(f"{type(self).__name__} does not implement reset_parameters()")

    def mappings(self, streams: Tensor) -> StreamMappings:
        """The mappings [..., n], [..., n], [..., n, n] for streams [..., n, C]."""
        raise TypeError(f"{type(self).__name__} does not implement mappings()")

    def read(self, streams: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Any]:
        """Give a sub-layer its input.

        Args:
            streams: [..., n, C].
            carry: What the previous sub-layer's ``write`` handed on.

        Returns:
            The sub-layer's input [..., C], and the state that ``write`` needs.
        """
        mappings = self.mappings(streams)
        # Whatever leaves the window, the streams were read with this.
        shown = self.window(streams, mappings)._replace(pre=mappings.pre)
        return aggregate_streams(streams, mappings.pre), (streams, shown)

    def write(self, streams: Tensor, output: Tensor, state: Any) -> Merged:
        """Merge a sub-layer's output [..., C] into the streams [..., n, C].

        Returns:
            The new streams, and the carry for the next sub-layer's ``read``.
        """
        kept, mappings = state
        return merge_streams(kept, output, mappings.residual, mappings.post), None

    def carry_like(self, streams: Tensor) -> Tensor | None:
        """An uninitialised carry as ``write`` returns it beside streams [..., n, C], or None."""
        return None

    def follow(self, before: Unmerged) -> tuple[Tensor, Tensor, Any]:
        """Merge what the sub-layer before left and read, across the seam of the two.

        Returns:
            The merged streams [..., n, C], this sub-layer's input [..., C], and the state that
            ``write`` needs.
        """
        streams, carry = before.merge()
        u, state = self.read(streams, carry)
        return streams, u, state

    def run(
        self, before: Tensor | Unmerged, sublayer: Sublayer, carry: Tensor | None = None
    ) -> Unmerged:
        """Read and apply a sub-layer; its output is still to be merged.

        Args:
            before: Streams [..., n, C], or what the sub-layer before left unmerged.
            sublayer: [..., C] -> [..., C], its pre-norm included.
            carry: What the ``write`` of the sub-layer before handed on, beside streams.
        """
        if isinstance(before, Unmerged):
            streams, u, state = self.follow(before)
        else:
            streams = before
            u, state = self.read(streams, carry)
        note_read(streams, u, state[1] if self.replays else None)
        output = sublayer(u)
        note_output(output)
        return Unmerged(self, streams, output, state)

    def forward(self, streams: Tensor, sublayer: Sublayer) -> Tensor:
        """Read, apply ``sublayer`` ([..., C] -> [..., C], its pre-norm included), write."""
        return self.run(streams, sublayer).merge()[0]

    def extra_repr(self) -> str:
        """Show what distinguishes this connection in a printed model."""
        return f"dim={self.dim}, num_streams={self.num_streams}, layer_index={self.layer_index}"

    def _coefficient_parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter, float32 even under a lower default precision."""
        double = torch.get_default_dtype() == torch.float64
        return nn.Parameter(torch.empty(shape, dtype=torch.float64 if double else torch.float32))
