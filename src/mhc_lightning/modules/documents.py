"""Where the documents of packed sequences begin, for parts that keep documents apart.

Shapes: B batch, S new positions of each row.
"""

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

DOCUMENTS = -2  # the place of `Documents` in what a network recalls of its tokens

_BLOCK = 128  # positions of a block of FlexAttention's masks, its own default


class Documents:
    """To which document each position of a batch belongs.

    Args:
        starts: int64 [B, S], the place in its row of the first token of each token's document.
        places: int64 [S] or [B, S], the place of each token in its row, from 0.

    Attributes:
        starts: As given.
        places: As given.
        block_mask: The mask for FlexAttention; None where it is not used.
    """

    def __init__(self, starts: Tensor, places: Tensor) -> None:
        self.starts = starts
        self.places = places
        # A mask is made here, once for all blocks of a network, and outside of compiled code.
        whole = places.dim() == 1
        self.block_mask = block_mask_of(starts) if starts.is_cuda and whole else None

    @classmethod
    def of(cls, tokens: Tensor, end_of_document: int) -> "Documents":
        """The documents of whole rows of tokens [B, S], each ended by `end_of_document`."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        begins = F.pad(tokens[:, :-1] == end_of_document, (1, 0))
        return cls((begins * places).cummax(1).values, places)

    @property
    def positions(self) -> Tensor:
        """The place of each token in its document [B, S], from 0."""
        return self.places - self.starts

    @cached_property
    def spans(self) -> list[list[int]]:
        """For each row the lengths of its pieces, in order: each lies in one document."""
        begins = (self.starts == self.places).cpu()
        length = begins.shape[1]
        cuts = [[0, *(row[1:].nonzero().flatten() + 1).tolist(), length] for row in begins]
        return [[stop - start for start, stop in pairwise(row)] for row in cuts]

    def apart(self, run: Callable[..., Tensor], *tensors: Tensor, dim: int) -> Tensor:
        """Run a function of sequences for each document alone, and join its results.

        Rows in which one document fills all of the positions are not cut.

        Args:
            run: Takes a piece of each tensor, with a batch of 1 unless there is nothing to cut.
            tensors: Each [B, …], with S positions in dimension `dim`.
            dim: The dimension of the positions, in the result too.
        """
        if all(len(lengths) == 1 for lengths in self.spans):
            return run(*tensors)
        # A split has one backward pass; that of each slice would fill a whole tensor.
        rows = zip(*(tensor.split(1) for tensor in tensors), strict=True)
        results = []
        for lengths, row in zip(self.spans, rows, strict=True):
            pieces = zip(*(tensor.split(lengths, dim) for tensor in row), strict=True)
            results.append(torch.cat([run(*piece) for piece in pieces], dim))
        return torch.cat(results)


def block_mask_of(starts: Tensor) -> "BlockMask":
    """FlexAttention's mask of causal attention within documents.

    It is built from the blocks themselves: `create_block_mask` would make all S × S entries first.

    Args:
        starts: int64 [B, S], as `Documents` has them.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = starts.shape[1]
    blocks = torch.arange(-(-length // _BLOCK), device=starts.device)
    queries, keys = blocks[:, None], blocks
    last = (blocks * _BLOCK + _BLOCK - 1).clamp(max=length - 1)
    # Starts ascend: those of a block's first and last query bound what its queries see.
    seen_by_one = keys >= (starts[:, blocks * _BLOCK] // _BLOCK)[..., None]
    seen_by_all = keys * _BLOCK >= starts[:, last][..., None]
    is_whole = (queries + 1) * _BLOCK <= length
    full = seen_by_all & (keys < queries) & is_whole
    partial = seen_by_one & (keys <= queries) & ~full

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[batch, query])

    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The number of chosen key blocks of each query block, and all, the chosen ones first.

    Args:
        chosen: bool [B, query blocks, key blocks].

    Returns:
        int32 [B, 1, query blocks] and [B, 1, query blocks, key blocks].
    """
    order = (~chosen).int().argsort(dim=-1, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]
