"""Over-Encoding: hashed n-gram rows, added to the embedding (arXiv 2501.16975).

Shapes: B batch, S sequence, C width of the network, H rows of a position.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules.memory.hashing import NgramHash
from mhc_lightning.modules.memory.layout import NgramLayout, row_width, spaced_layout
from mhc_lightning.modules.memory.memory import (
    INPUT,
    HeadMemory,
    InputMemory,
    Memory,
    Recalled,
)
from mhc_lightning.modules.memory.over_decoding import OverDecoding
from mhc_lightning.modules.memory.settings import Placement, check_reading
from mhc_lightning.modules.memory.table import NgramTable
from mhc_lightning.modules.precision import autocast_dtype


class OverEncoding(Memory):
    """A hierarchical n-gram embedding: an input token also brings rows of the n-grams it ends.

    Args:
        rows: Rows of the first head; head k has `rows + 2·k`.
        orders: n of the n-grams.
        num_heads: Slices (heads) of each order, each with rows and a projection of its own.
        dim: Values that the rows of one order have together; None for C over the orders,
            rounded down to what the heads can share.
        word_scale: `full` leaves the word's embedding as it is (LongCat-Flash-Lite-Sparse); `mean`
            divides it as the rows are, by 1 + H (the paper).
        over_decoding_weight: Weight of the loss of the token after the next, in training (see
            `OverDecoding`; the paper's is 0.1); 0 for none.
        compress: Whether tokens that differ in case, accents and spaces only are hashed alike.
        documents: Whether n-grams end where documents begin.
        pad_token: The token in place of a missing one; None for the one that ends documents.
        placement: Where the rows are: `device`, `sharded` or `host`.
        deterministic: Whether rows of `host` are never older than the last update.
        vocab_size: V of the network.
        model_dim: C of the network.
        num_layers: Of the network; this memory does not need it, nor the next two.
        num_streams: Of the network.
        norm_eps: Of the network.

    Attributes:
        word_divisor: [1], what the word's embedding is divided by. It is for readers of a
            checkpoint.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        model_dim: int,
        num_layers: int = 0,
        num_streams: int = 0,
        norm_eps: float = 0.0,
        rows: int,
        orders: Sequence[int] = (2, 3),
        num_heads: int = 4,
        dim: int | None = None,
        word_scale: Literal["mean", "full"] = "full",
        over_decoding_weight: float = 0.0,
        compress: bool = False,
        documents: bool = True,
        pad_token: int | None = 0,
        placement: Placement = "device",
        deterministic: bool = True,
    ) -> None:
        super().__init__()
        if word_scale not in ("mean", "full"):
            raise UserError(f"memory.word_scale must be mean or full, not {word_scale!r}")
        if not 0 <= over_decoding_weight < math.inf:
            raise UserError(
                f"memory.over_decoding_weight must be at least 0, not {over_decoding_weight}"
            )
        layout = spaced_layout(orders, num_heads, rows, vocab_size)
        width = row_width(layout, dim, default=model_dim // layout.heads)
        check_reading(pad_token, placement, vocab_size)
        self.hash = NgramHash(layout, vocab_size, "polynomial")
        self.places = (INPUT,)
        self.compress, self.documents, self.pad_token = compress, documents, pad_token
        self.placement, self.deterministic = placement, deterministic
        self.shape_settings = {"dim": width * num_heads, "word_scale": word_scale}
        self.shape_settings["over_decoding_weight"] = "above 0" if over_decoding_weight else "0"
        self._over_decoding_weight = over_decoding_weight
        self.register_buffer("word_divisor", torch.empty(1, dtype=torch.int64))
        self._word_scale, self._row_width, self._dim = word_scale, width, model_dim
        self.reset_parameters()

    word_divisor: Tensor

    def reset_parameters(self) -> None:
        """Fill the buffer."""
        assert self.hash is not None
        self.word_divisor.fill_(1 if self._word_scale == "full" else 1 + self.hash.layout.heads)

    def input_memory(self) -> InputMemory:
        """The part for the embedding."""
        assert self.hash is not None
        return OverEncodingInput(self.hash.layout, self._row_width, self._dim, self._word_scale)

    def head_memory(self) -> HeadMemory | None:
        """The part for the loss."""
        weight = self._over_decoding_weight
        return OverDecoding(self._dim, weight) if weight else None


class OverEncodingInput(InputMemory):
    """x ← (x + Σ_k W_k e_k) / (1 + H), with e_k the row of head k.

    Args:
        layout: The sizes of the table.
        row_width: Width of a row.
        dim: C.
        word_scale: See `OverEncoding`.

    Attributes:
        projection: All W_k side by side, [C, H · row_width].
    """

    def __init__(
        self, layout: NgramLayout, row_width: int, dim: int, word_scale: Literal["mean", "full"]
    ) -> None:
        super().__init__()
        self.table = NgramTable(layout, row_width)
        self.projection = nn.Linear(layout.heads * row_width, dim, bias=False)
        self.scale = 1 / (1 + layout.heads)
        self.word_scale = self.scale if word_scale == "mean" else 1.0

    def forward(self, x: Tensor, recalled: Recalled) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        rows = self.table(recalled[INPUT]).flatten(-2)
        rows = rows.to(autocast_dtype(rows) or x.dtype)
        return self.word_scale * x + self.scale * self.projection(rows)
