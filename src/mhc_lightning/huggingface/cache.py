"""The tokens so far, as transformers' `generate` keeps them: caches of a `Transformer` inside."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mhc_lightning.errors import UserError
from mhc_lightning.huggingface.padding import Padding
from mhc_lightning.modules import Transformer
from mhc_lightning.modules.connection import Merged


class MhcCache(Cache):
    """Latents of attention, and what a memory needs of the past, of a batch that is continued.

    It grows with the batch, and knows the length of each row without its padding.

    Args:
        network: The network whose tokens it keeps.
    """

    def __init__(self, network: Transformer) -> None:
        super().__init__(layers=[])
        self._network = network
        self._caches: list[Any] = []
        self._columns = 0

    def run(self, tokens: Tensor, padding: Padding) -> Merged:
        """Continue the rows by tokens [B, S], with each row's padding at its end.

        Returns:
            Streams [B, S, n, C] and their carry.
        """
        batch, length = tokens.shape
        if not self._caches:
            self._caches = self._network.new_caches(batch, 2 * length)
        for cache in self._caches[: len(self._network.blocks)]:
            cache.reserve(cache.longest + length)
        self._columns += length
        return self._network.run_cached(tokens, self._caches, padding.counts(tokens.device))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch so far, padding included."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def __len__(self) -> int:
        return len(self._network.blocks)

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first tokens."""
        return len(self._caches[0].lengths) if self._caches else -1

    @property
    def is_initialized(self) -> bool:
        """True once it holds tokens."""
        return bool(self._caches)

    @property
    def is_compileable(self) -> bool:
        """False: shapes change with every token."""
        return False

    @property
    def is_croppable(self) -> bool:
        """True unless a memory, or what keeps documents apart, knows the last few tokens only."""
        return len(self._caches) <= len(self)

    def reset(self) -> None:
        """Forget all tokens."""
        self._caches, self._columns = [], 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows [K], in their order."""
        for cache in self._caches:
            cache.keep(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows [B], in their order, as beam search continues them."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self._caches:
            rows = torch.arange(self.batch_size, device=self._caches[0].lengths.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of each row, which no padding may be among.

        Args:
            tokens_to_remove: Their number, negated as transformers has it.

        Raises:
            UserError: The cache does not keep enough of the past.
        """
        count = abs(tokens_to_remove)
        if count and not self.is_croppable:
            raise UserError(
                "a memory of n-grams, or documents kept apart, know the last few tokens only, so"
                " that none can be taken back; generate without an assistant model and without"
                " prompt lookup"
            )
        for cache in self._caches if count else ():
            cache.remove(count)
        self._columns -= count
