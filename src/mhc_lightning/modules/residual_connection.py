"""The ordinary residual connection, as the one-stream member of the family."""

from typing import Any

from torch import Tensor

from mhc_lightning.kernels import StreamMappings, note_merge
from mhc_lightning.modules.connection import Connection


class ResidualConnection(Connection):
    """`x + F(x)`: one stream, all mappings one, no parameters.

    Args:
        dim: Width C.
        num_streams: Ignored, always 1; accepted so that all connections are built alike.
        layer_index: The number of the sub-layer in the network, from 0.
    """

    def __init__(self, dim: int, num_streams: int = 1, layer_index: int = 0) -> None:
        super().__init__(dim, 1, layer_index)

    def start_as_residual(self) -> None:
        """Do nothing: it is one."""

    def mappings(self, streams: Tensor) -> StreamMappings:
        """Ones, as views of a single number.

        Raises:
            ValueError: There is more than one stream.
        """
        if streams.shape[-2] != 1:
            raise ValueError(
                f"a residual connection takes streams [..., 1, C], not {list(streams.shape)}"
            )
        one = streams.new_ones(1).float() if streams.dtype.itemsize < 4 else streams.new_ones(1)
        vector = one.expand(streams.shape[:-1])
        return StreamMappings(vector, vector, one.expand(*streams.shape[:-1], 1))

    def read(self, streams: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Any]:
        """The only stream is the sub-layer's input."""
        mappings = self.window(streams, self.mappings(streams))
        return streams.squeeze(-2), mappings

    def write(self, streams: Tensor, output: Tensor, state: Any) -> tuple[Tensor, Tensor | None]:
        """Add the output."""
        merged = streams + output.unsqueeze(-2).to(streams.dtype)
        note_merge(state.residual, merged)
        return merged, None
