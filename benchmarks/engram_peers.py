"""Engram as others compute it, written from their description, to be timed beside the package's.

`DemoEngram` is organised as DeepSeek's released demonstration: hashes by numpy in every forward
pass, `nn.Embedding`, a `nn.Linear` with bias for each stream's key, modules for the norms, and
`nn.Conv1d`. `DeviceEngram` differs as Megatron's open proposals do: hashes by torch, and one
projection of all keys and the value. Neither keeps hashes from one layer or step for another.
"""

import numpy as np
import torch
from torch import Tensor, nn

from mhc_lightning.modules.memory.layout import NgramLayout


class DemoEngram(nn.Module):
    """Engram of one block on streams [B, S, n, C], as in the demonstration.

    Args:
        layout: The sizes of the tables.
        multipliers: int64 [N].
        table: Which of the layout's tables it has.
        dim: C.
        num_streams: n.
        row_width: Values of a row.
        kernel: Taps of the convolution.
    """

    def __init__(
        self,
        layout: NgramLayout,
        multipliers: np.ndarray,
        table: int,
        dim: int,
        num_streams: int,
        row_width: int,
        kernel: int = 4,
    ) -> None:
        super().__init__()
        self.orders, self.num_heads, self.dim = layout.orders, layout.num_heads, dim
        self.multipliers = multipliers
        self.moduli = np.array(layout.moduli[table])
        self.offsets = np.cumsum([0, *self.moduli[:-1]])
        self.embedding = nn.Embedding(int(self.moduli.sum()), row_width)
        self._make_projections(layout.heads * row_width, dim, num_streams)
        self.key_norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(num_streams))
        self.stream_norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(num_streams))
        channels, reach = num_streams * dim, (kernel - 1) * layout.longest
        self.conv = nn.Conv1d(
            *(channels, channels, kernel),
            groups=channels,
            bias=False,
            padding=reach,
            dilation=layout.longest,
        )
        self.conv_norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-5) for _ in range(num_streams))

    def _make_projections(self, width: int, dim: int, num_streams: int) -> None:
        self.value = nn.Linear(width, dim)
        self.keys = nn.ModuleList(nn.Linear(width, dim) for _ in range(num_streams))

    def project(self, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Rows [B, S, E] -> keys of all streams and the value, each [B, S, C]."""
        return [key(rows) for key in self.keys], self.value(rows)

    def hash(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> rows [B, S, H]."""
        ids = tokens.numpy()
        mixed, rows = ids * self.multipliers[0], []
        for back in range(1, max(self.orders)):
            earlier = np.pad(ids, ((0, 0), (back, 0)))[:, : ids.shape[1]]
            mixed = np.bitwise_xor(mixed, earlier * self.multipliers[back])
            if back + 1 in self.orders:
                first = self.orders.index(back + 1) * self.num_heads
                heads = slice(first, first + self.num_heads)
                rows.append(mixed[..., None] % self.moduli[heads] + self.offsets[heads])
        return torch.from_numpy(np.concatenate(rows, -1))

    def forward(self, streams: Tensor, tokens: Tensor) -> Tensor:
        """[B, S, n, C], [B, S] -> [B, S, n, C]."""
        keys, value = self.project(self.embedding(self.hash(tokens)).flatten(-2))
        gates = []
        for i, key in enumerate(keys):
            score = (self.key_norms[i](key) * self.stream_norms[i](streams[:, :, i])).sum(-1)
            score = score / self.dim**0.5
            score = score.abs().clamp_min(1e-6).sqrt() * score.sign()
            gates.append(score.sigmoid()[..., None])
        gated = torch.stack(gates, 2) * value[:, :, None]
        normed = [norm(gated[:, :, i]) for i, norm in enumerate(self.conv_norms)]
        mixed = self.conv(torch.cat(normed, -1).transpose(1, 2))[..., : tokens.shape[1]]
        mixed = nn.functional.silu(mixed).transpose(1, 2).view_as(streams)
        return streams + gated + mixed


class DeviceEngram(DemoEngram):
    """The same with hashes by torch and one projection."""

    moduli_of_heads: Tensor
    first_rows: Tensor

    def _make_projections(self, width: int, dim: int, num_streams: int) -> None:
        self.projection = nn.Linear(width, (num_streams + 1) * dim)
        self.register_buffer("moduli_of_heads", torch.from_numpy(self.moduli))
        self.register_buffer("first_rows", torch.from_numpy(self.offsets))

    def project(self, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """As the demonstration's."""
        *keys, value = self.projection(rows).unflatten(-1, (-1, self.dim)).unbind(-2)
        return keys, value

    def hash(self, tokens: Tensor) -> Tensor:
        """As the demonstration's."""
        mixed, mixes = tokens * int(self.multipliers[0]), []
        for back in range(1, max(self.orders)):
            earlier = nn.functional.pad(tokens, (back, 0))[:, : tokens.shape[1]]
            mixed = mixed ^ (earlier * int(self.multipliers[back]))
            mixes += [mixed] * (self.num_heads if back + 1 in self.orders else 0)
        return torch.stack(mixes, -1) % self.moduli_of_heads + self.first_rows
