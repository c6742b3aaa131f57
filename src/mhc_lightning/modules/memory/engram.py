"""Engram: hashed n-gram rows, added to the streams through a gate (arXiv 2601.07372).

Shapes: B batch, S sequence, n streams, C width of the network, H rows of a position, D their width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_lightning.kernels import context_gates, gated_write
from mhc_lightning.kernels.precision import widened
from mhc_lightning.modules.documents import DOCUMENTS, Documents
from mhc_lightning.modules.memory.hashing import NgramHash
from mhc_lightning.modules.memory.layout import NgramLayout, prime_layout, row_width
from mhc_lightning.modules.memory.memory import BlockMemory, Memory, Recalled
from mhc_lightning.modules.memory.recent import RecentWindow
from mhc_lightning.modules.memory.settings import (
    Placement,
    check_reading,
    whole_number,
    whole_numbers,
)
from mhc_lightning.modules.memory.table import NgramTable
from mhc_lightning.modules.precision import autocast_dtype

_MOST_TAPS = 1024


def default_blocks(num_layers: int) -> list[int]:
    """Blocks with memory if none are named: the second one, and the one before the middle.

    These are blocks 2 and 15 of 30, and 2 and 6 of 12, counted from 1, as in the paper.
    """
    return sorted({min(1, num_layers - 1), max(0, num_layers // 2 - 1)})


class Engram(Memory):
    """Conditional memory by hashed look-up, read in chosen blocks, before their attention.

    Args:
        layers: Blocks with a memory, from 0; None for `default_blocks`.
        orders: n of the n-grams.
        num_heads: Hash functions of each order.
        rows: Least rows of a head; the prime numbers from there on are taken.
        dim: Values that the rows of one order have together; None for a quarter of C, rounded
            down to what the heads can share.
        conv: Whether a short convolution follows the gate.
        conv_kernel: Taps of the convolution, N positions apart.
        bias: Whether the key and value projections have a bias (the released demo's have).
        zero_start: Whether the value projection starts at zero: the network then computes at
            first what it computes without memory. The paper does not say how it starts.
        seed: Seed of the hash.
        multipliers: Multipliers of the hash (blocks × N) in place of drawn ones.
        compress: Whether tokens that differ in case, accents and spaces only are hashed alike.
        documents: Whether n-grams end where documents begin.
        pad_token: The token in place of a missing one; None for the one that ends documents.
        placement: Where the rows are: `device`, `sharded` or `host`.
        deterministic: Whether rows of `host` are never older than the last update.
        vocab_size: V of the network.
        model_dim: C of the network.
        num_layers: Blocks of the network.
        num_streams: n of the network.
        norm_eps: Epsilon of the norms of keys and streams.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        model_dim: int,
        num_layers: int,
        num_streams: int,
        norm_eps: float = 1e-20,
        rows: int | Sequence[int],
        layers: Sequence[int] | None = None,
        orders: Sequence[int] = (2, 3),
        num_heads: int = 8,
        dim: int | None = None,
        conv: bool = True,
        conv_kernel: int = 4,
        bias: bool = False,
        zero_start: bool = True,
        seed: int = 0,
        multipliers: Sequence[Sequence[int]] | None = None,
        compress: bool = True,
        documents: bool = True,
        pad_token: int | None = None,
        placement: Placement = "device",
        deterministic: bool = True,
    ) -> None:
        super().__init__()
        blocks = default_blocks(num_layers)
        if layers is not None:
            blocks = sorted(set(whole_numbers("layers", layers, 0, num_layers - 1)))
        layout = prime_layout(blocks, orders, num_heads, rows)
        width = row_width(layout, dim, default=model_dim // (4 * num_heads))
        whole_number("conv_kernel", conv_kernel, 1, _MOST_TAPS)
        check_reading(pad_token, placement, vocab_size)
        self.hash = NgramHash(layout, vocab_size, "multiply_xor", seed, multipliers)
        self.places = tuple(blocks)
        self.compress, self.documents, self.pad_token = compress, documents, pad_token
        self.placement, self.deterministic = placement, deterministic
        self.shape_settings = {"dim": width * num_heads, "conv": conv, "bias": bias}
        self.shape_settings |= {"conv_kernel": conv_kernel} if conv else {}
        self._settings: dict[str, Any] = {
            "dim": model_dim,
            "num_streams": num_streams,
            "row_width": width,
            "conv": conv,
            "conv_kernel": conv_kernel,
            "bias": bias,
            "zero_start": zero_start,
            "norm_eps": norm_eps,
        }

    def block_memory(self, block: int) -> BlockMemory | None:
        """A new part for a block, if it is one of `layers`."""
        assert self.hash is not None
        if block not in self.places:
            return None
        return EngramBlock(block=block, layout=self.hash.layout, **self._settings)


class EngramBlock(BlockMemory):
    """Engram in one block: rows, a gate for each stream, a short convolution.

    With e the rows of a position (concatenated), h_m stream m, and RMSNorms of their own for each
    stream (all in float32):

        s_m = ⟨norm(h_m), norm(W_K,m e)⟩ / √C
        g_m = σ(sign(s_m) · √max(|s_m|, 1e-6))
        v_m = g_m · W_V e
        h_m ← h_m + v_m + SiLU(conv(norm(v_m)))

    The gate's slope is at most 125, where |s| is just above 1e-6, and zero below.

    The convolution is depthwise and causal; its taps are N positions apart and start at zero.

    Args:
        block: The number of the block.
        layout: The sizes of the tables.
        dim: C.
        num_streams: n.
        row_width: D.
        conv: Whether there is a convolution.
        conv_kernel: Its taps.
        bias: Whether the projections have a bias.
        zero_start: Whether `value` starts at zero.
        norm_eps: Epsilon of the norms of keys and streams.
    """

    def __init__(
        self,
        block: int,
        layout: NgramLayout,
        dim: int,
        num_streams: int,
        row_width: int,
        conv: bool,
        conv_kernel: int,
        bias: bool,
        zero_start: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.block, self.dim, self.num_streams = block, dim, num_streams
        self.dilation, self.norm_eps = layout.longest, norm_eps
        self.table = NgramTable(layout, row_width)
        width = layout.heads * row_width
        self.key = nn.Linear(width, num_streams * dim, bias=bias)
        self.value = nn.Linear(width, dim, bias=bias)
        if zero_start:
            self.value.init_std = 0.0  # type: ignore[assignment]  # for a Transformer's draw
            with torch.no_grad():
                for parameter in self.value.parameters():
                    parameter.zero_()
        self.gate = EngramGate(dim, num_streams, norm_eps)
        self.conv = ShortConvolution(dim, num_streams, conv_kernel, self.dilation) if conv else None

    @property
    def gate_window(self) -> nn.Module:
        """See `BlockMemory`."""
        return self.gate.window

    def new_cache(self, batch_size: int, dtype: torch.dtype) -> RecentWindow | None:
        """An empty cache of what the convolution sees: values and gates, at least in float32."""
        if self.conv is None:
            return None
        like = self.gate.key_norm  # a quantised projection has no weight that is a tensor
        shape = (batch_size, self.conv.reach, self.dim + self.num_streams)
        wide = torch.promote_types(dtype, torch.float32)
        return RecentWindow(torch.zeros(shape, dtype=wide, device=like.device))

    def forward(
        self, streams: Tensor, recalled: Recalled, cache: RecentWindow | None = None
    ) -> Tensor:
        """[B, S, n, C] -> [B, S, n, C]."""
        rows = self.table(recalled[self.block], beside=streams).flatten(-2)  # [B, S, H · D]
        rows = rows.to(autocast_dtype(rows) or streams.dtype)
        key = self.key(rows).unflatten(-1, (self.num_streams, self.dim))
        value = self.value(rows)
        streams, gate = self.gate(streams, key)
        if self.conv is None:
            return gated_write(streams, value, gate)
        write = partial(gated_write, taps=self.conv(), dilation=self.dilation)
        documents = recalled.get(DOCUMENTS)
        if cache is not None:
            seen = cache.extend(torch.cat([value, gate], -1))
            if documents is not None:
                return self._write_cached(write, streams, seen, documents)
            value, gate = seen.split([self.dim, self.num_streams], -1)
        elif documents is not None:
            return documents.apart(write, streams, value, gate, dim=1)
        return write(streams, value, gate)

    def _write_cached(
        self, write: Callable[..., Tensor], streams: Tensor, seen: Tensor, documents: Documents
    ) -> Tensor:
        """`write` in which the convolution sees no position of another document.

        Args:
            write: Takes streams, values and gates.
            streams: [B, S, n, C].
            seen: Values and gates [B, P, C + n] of the positions and of those before them.
            documents: Those of the positions.
        """
        length, widths = streams.shape[1], [self.dim, self.num_streams]
        reach = seen.shape[1] - length
        back = torch.arange(-reach, 0, device=seen.device)

        def write_piece(rows: slice, begin: int, end: int) -> Tensor:
            places, starts = documents.places[rows, begin], documents.starts[rows, begin]
            belongs = places[:, None] + back >= starts[:, None]  # [b, reach]
            belongs = F.pad(belongs, (0, end - begin), value=True)
            piece = seen[rows, begin : end + reach] * belongs[..., None]
            return write(streams[rows, begin:end], *piece.split(widths, -1))

        if all(len(pieces) == 1 for pieces in documents.spans):
            return write_piece(slice(None), 0, length)
        written = []
        for row, pieces in enumerate(documents.spans):
            begin = 0
            for size in pieces:
                written.append(write_piece(slice(row, row + 1), begin, begin + size))
                begin += size
        return torch.cat(written, 1).view_as(streams)


class EngramGate(nn.Module):
    """How much of a value each stream takes: see `EngramBlock`.

    Args:
        dim: C.
        num_streams: n.
        norm_eps: Epsilon of the norms.

    Attributes:
        key_norm: [n · C], weights of the keys' norms.
        stream_norm: [n · C], weights of the streams' norms.
        window: Gates [B, S, n] pass through it, for observers.
    """

    def __init__(self, dim: int, num_streams: int, norm_eps: float) -> None:
        super().__init__()
        self.dim, self.num_streams, self.norm_eps = dim, num_streams, norm_eps
        # One dimension, as all weights of norms: they are not decayed.
        self.key_norm = nn.Parameter(torch.empty(num_streams * dim))
        self.stream_norm = nn.Parameter(torch.empty(num_streams * dim))
        self.window = nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the weights with one."""
        with torch.no_grad():
            self.key_norm.fill_(1)
            self.stream_norm.fill_(1)

    def forward(self, streams: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Streams and keys [B, S, n, C] -> the streams, to go on with, and gates [B, S, n]."""
        weight = widened(self.key_norm) * widened(self.stream_norm)
        streams, gate = context_gates(streams, key, weight.view(-1, self.dim), self.norm_eps)
        return streams, self.window(gate)


class ShortConvolution(nn.Module):
    """The parameters of a depthwise causal convolution of normalised values; zero at the start.

    Args:
        dim: C.
        num_streams: n.
        kernel: Taps.
        dilation: Positions between taps.

    Attributes:
        reach: Positions before the present one that it sees.
        weight: [n · C · kernel], the taps of a channel together, the present position last.
        norm: [n · C], the weights of the input's norm, for each stream by itself.
    """

    def __init__(self, dim: int, num_streams: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.dim, self.num_streams = dim, num_streams
        self.kernel, self.dilation = kernel, dilation
        self.reach = (kernel - 1) * dilation
        self.weight = nn.Parameter(torch.empty(num_streams * dim * kernel))
        self.norm = nn.Parameter(torch.empty(num_streams * dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the taps, and fill the norm's weights with one."""
        with torch.no_grad():
            self.weight.zero_()
            self.norm.fill_(1)

    def forward(self) -> Tensor:
        """The taps with the norm's weights in them, [kernel, n, C], as `gated_write` takes them."""
        taps = widened(self.weight).view(-1, self.dim, self.kernel)
        return (taps * widened(self.norm).view(-1, self.dim, 1)).movedim(-1, 0)
