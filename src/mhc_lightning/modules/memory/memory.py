"""The base of all memories: what a network holds, and what its embedding and its blocks get of it.

Shapes: B batch, S sequence, n streams, C width of the network, H rows of a position in a table.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhc_lightning.modules.memory.hashing import NOT_A_TOKEN, NgramHash
from mhc_lightning.modules.memory.recent import RecentWindow
from mhc_lightning.modules.memory.row_store import RowStore
from mhc_lightning.modules.memory.table import NgramTable

Recalled = Mapping[int, Any]
"""What depends on tokens alone: rows int64 [B, S, H] by block (from 0) or `INPUT`.

A network that keeps documents apart adds its `Documents` at `DOCUMENTS`.
"""

INPUT = -1  # the place of a memory at the embedding


class MemoryPart(nn.Module):
    """A part of a memory; one that reads rows of a table has it as `table`."""

    def rows_of(self, recalled: Recalled) -> Tensor:
        """The rows int64 [B, S, H] that this part reads."""
        raise TypeError(f"{type(self).__name__} does not implement rows_of()")

    def fetch_ahead(self, recalled: Recalled) -> None:
        """Begin to fetch the rows of this batch, if they are not on the device."""
        store = self._store()
        if store is not None:
            store.fetch_ahead(self.rows_of(recalled))

    def prefetch(self, recalled: Recalled, before_update: bool) -> None:
        """Begin to fetch the rows of the micro-batch that follows the present one, likewise.

        Args:
            recalled: What is recalled for that micro-batch.
            before_update: True if the present micro-batch is the last one of its optimizer step.
        """
        store = self._store()
        if store is not None:
            store.prefetch(self.rows_of(recalled), before_update)

    def _store(self) -> RowStore | None:
        table = getattr(self, "table", None)
        return table.store if isinstance(table, NgramTable) else None


class InputMemory(MemoryPart):
    """The part of a memory that acts on the embedding.

    Attributes:
        word_scale: Factor of the embedding in the sum with what the memory adds.
    """

    word_scale = 1.0

    def rows_of(self, recalled: Recalled) -> Tensor:
        """See `MemoryPart`."""
        rows: Tensor = recalled[INPUT]
        return rows

    def forward(self, x: Tensor, recalled: Recalled) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        raise TypeError(f"{type(self).__name__} does not implement forward()")


class BlockMemory(MemoryPart):
    """The part of a memory that acts on the streams before a block's attention.

    Attributes:
        block: The number of the block, from 0.
    """

    block: int

    def rows_of(self, recalled: Recalled) -> Tensor:
        """See `MemoryPart`."""
        rows: Tensor = recalled[self.block]
        return rows

    @property
    def gate_window(self) -> nn.Module | None:
        """A submodule through which gates [B, S, n] pass, for observers; None without gates."""
        return None

    def new_cache(self, batch_size: int, dtype: torch.dtype) -> RecentWindow | None:
        """An empty cache of what `forward` needs of earlier positions; None if nothing."""
        return None

    def forward(
        self, streams: Tensor, recalled: Recalled, cache: RecentWindow | None = None
    ) -> Tensor:
        """[B, S, n, C] -> [B, S, n, C]."""
        raise TypeError(f"{type(self).__name__} does not implement forward()")


class HeadMemory(nn.Module):
    """The part of a memory that adds to the loss in training."""

    def forward(
        self, output: nn.Module, hidden: Tensor, targets: Tensor, ignore_index: int
    ) -> Tensor:
        """What it adds, a float32 scalar.

        Args:
            output: The network's output projection.
            hidden: [B, S, C], what the projection takes.
            targets: int64 [B, S], the next tokens.
            ignore_index: Targets equal to it do not count.
        """
        raise TypeError(f"{type(self).__name__} does not implement forward()")


class Memory(nn.Module):
    """A memory of n-grams, without any by itself; subclasses recall something.

    A network builds its memory with the network's sizes, puts the parts where they belong, and
    calls `recall` once per batch. Tokenizers are bound with `bind`.

    Args:
        sizes: `vocab_size`, `model_dim` (C), `num_layers` (blocks), `num_streams` (n) and
            `norm_eps` of the network.

    Attributes:
        hash: What takes tokens to rows; None without a memory.
        places: Blocks, or `INPUT`, in the order of the hash's tables.
        compress: Whether tokens of one class are hashed alike.
        documents: Whether n-grams end where documents begin.
        pad_token: The token in place of a missing one; None for the one that ends documents.
        placement: Where the rows are: `device`, `sharded` or `host`.
        deterministic: Whether rows in the machine's memory are never older than the last update.
        shape_settings: Settings that decide names and shapes of weights, by name.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.hash: NgramHash | None = None
        self.places: tuple[int, ...] = ()
        self.shape_settings: dict[str, Any] = {}
        self.compress = self.documents = False
        self.pad_token: int | None = None
        self.placement, self.deterministic = "device", True

    def input_memory(self) -> InputMemory | None:
        """A new part for the embedding, if this memory has one."""
        return None

    def block_memory(self, block: int) -> BlockMemory | None:
        """A new part for a block, if this memory has one there."""
        return None

    def head_memory(self) -> HeadMemory | None:
        """A new part for the loss, if this memory has one."""
        return None

    def bind(self, classes: np.ndarray, end_of_document: int) -> None:
        """Take the tokenizer of a network's tokens.

        Args:
            classes: int64 [V or fewer], the class of each token: tokens of one class differ in
                case, accents and spaces only.
            end_of_document: The token that ends a document.

        Raises:
            UserError: The tokenizer has more tokens than the network, or the memory is bound to
                another one.
        """
        if self.hash is not None:
            self.hash.bind(
                classes if self.compress else np.arange(len(classes)),
                end_of_document if self.pad_token is None else self.pad_token,
                end_of_document if self.documents else None,
            )

    def bind_alone(self) -> None:
        """Do without a tokenizer, for good: each token is its own class, and documents have no end.

        Raises:
            UserError: The memory is bound to a tokenizer.
        """
        if self.hash is not None:
            self.hash.bind(np.arange(self.hash.vocab_size), self.pad_token or 0, None)

    @property
    def is_bound(self) -> bool:
        """True once it is clear which tokens the memory hashes alike, as it is without a memory."""
        return self.hash is None or self.hash.is_bound

    def recall(self, tokens: Tensor, history: Tensor | None = None) -> Recalled:
        """What the parts need to know of tokens [B, S], and of `history` before them.

        Args:
            tokens: int64 [B, S].
            history: int64 [B, N - 1], the tokens before them; -1 where there is none.
        """
        if self.hash is None:
            return {}
        return dict(zip(self.places, self.hash(tokens, history), strict=True))

    def new_history(self, batch_size: int, device: torch.device) -> RecentWindow | None:
        """An empty window of the tokens that `recall` needs of the past; None if none."""
        if self.hash is None:
            return None
        before = self.hash.layout.longest - 1
        return RecentWindow(
            torch.full((batch_size, before), NOT_A_TOKEN, dtype=torch.int64, device=device)
        )
