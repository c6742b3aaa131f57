"""A Transformer block (attention and feed-forward, each behind a connection), and runs of blocks.

Shapes: B batch, S sequence, n streams, C width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from mhc_lightning.modules.attention import LatentCache
from mhc_lightning.modules.connection import Connection, Merged, Sublayer, Unmerged
from mhc_lightning.modules.documents import DOCUMENTS
from mhc_lightning.modules.memory import BlockMemory, Recalled
from mhc_lightning.modules.memory.recent import RecentWindow
from mhc_lightning.modules.norm import RMSNorm
from mhc_lightning.modules.recompute import normalise, note_entry


class BlockCache(NamedTuple):
    """What a block keeps of the tokens so far.

    Attributes:
        attention: Keys and values.
        memory: What its memory needs; None if nothing.
    """

    attention: LatentCache
    memory: RecentWindow | None

    @property
    def lengths(self) -> Tensor:
        """Number of tokens in each row [B], int64."""
        return self.attention.lengths

    @property
    def longest(self) -> int:
        """An upper bound of the number of tokens in each row."""
        return self.attention.longest

    def advance(self, counts: Tensor, most: int) -> None:
        """Count the first `counts` [B] of the tokens just written, each at most `most`."""
        self.attention.advance(counts, most)
        if self.memory is not None:
            self.memory.advance(counts, most)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in each row."""
        self.attention.reserve(length)

    def remove(self, count: int) -> None:
        """Take back the last `count` tokens of each row, unless a memory needs them.

        Raises:
            TypeError: The block has a memory, which keeps the last few tokens only.
        """
        if self.memory is not None:
            raise TypeError("a memory cannot take tokens back")
        self.attention.remove(count)

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows [K] only, in their order; a row may be kept several times."""
        self.attention.keep(rows)
        if self.memory is not None:
            self.memory.keep(rows)


class PreNorm(nn.Module):
    """A sub-layer: `body(norm(x))` on [..., C]; further arguments go to `body`."""

    def __init__(self, dim: int, norm_eps: float, body: nn.Module) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps=norm_eps)
        self.body = body

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.body(normalise(self.norm, x), **kwargs)


class Block(nn.Module):
    """Attention and feed-forward, each behind its own connection.

    A memory, if there is one, changes the streams before attention reads them.

    Attributes:
        merge_last: The function that merges the feed-forward's output. A pipeline replaces
            `Unmerged.merge` by a merge on another stream of the device.
    """

    def __init__(
        self,
        attention_connection: Connection,
        attention: PreNorm,
        feed_forward_connection: Connection,
        feed_forward: PreNorm,
        memory: BlockMemory | None = None,
    ) -> None:
        super().__init__()
        self.attention_connection = attention_connection
        self.attention = attention
        self.feed_forward_connection = feed_forward_connection
        self.feed_forward = feed_forward
        self.memory = memory
        self.merge_last: Callable[[Unmerged], Merged] = Unmerged.merge

    def forward(
        self,
        streams: Tensor | Unmerged,
        carry: Tensor | None = None,
        cache: BlockCache | None = None,
        merge: bool = True,
        recalled: Recalled | None = None,
    ) -> Merged | Unmerged:
        """Run both sub-layers.

        Args:
            streams: [B, S, n, C], or the unmerged output of the preceding block.
            carry: The carry of the preceding block, beside streams.
            cache: What the block keeps of earlier tokens.
            merge: Whether to merge the feed-forward's output; if not, the next block merges it
                while it reads.
            recalled: What the network recalls of the tokens of this batch.

        Returns:
            Streams [B, S, n, C] and their carry; without `merge`, an `Unmerged` for the next block.
        """
        more: dict[str, Any] = {} if cache is None else {"cache": cache.attention}
        if recalled and DOCUMENTS in recalled:
            more["documents"] = recalled[DOCUMENTS]
        attention: Sublayer = partial(self.attention, **more) if more else self.attention
        if self.memory is not None:
            streams, carry = streams.merge() if isinstance(streams, Unmerged) else (streams, carry)
            note_entry()
            kept = None if cache is None else cache.memory
            streams = self.memory(streams, recalled or {}, kept)
        unmerged = self.attention_connection.run(streams, attention, carry)
        unmerged = self.feed_forward_connection.run(unmerged, self.feed_forward)
        return self.merge_last(unmerged) if merge else unmerged


def run_blocks(
    blocks: Sequence[nn.Module],
    streams: Tensor,
    carry: Tensor | None,
    recalled: Recalled | None = None,
) -> Merged:
    """Take streams [B, S, n, C] and their carry through `blocks`, with what is recalled of tokens.

    Between two plain blocks the merge is left to the second block, which reads in the same step.
    """
    more = {"recalled": recalled} if recalled else {}  # a block that needs none may not take it
    flow: tuple[Tensor, Tensor | None] | tuple[Unmerged] = (streams, carry)
    for block, following in zip(blocks, (*blocks[1:], None), strict=True):
        if _is_plain(block) and _is_plain(following):
            flow = (block(*flow, merge=False, **more),)
        else:
            flow = block(*flow, **more)
    return flow  # type: ignore[return-value]  # the last block has merged


def _is_plain(block: nn.Module | None) -> bool:
    """True unless the block is wrapped: a wrapper (a reentrant checkpoint, say) passes tensors."""
    return isinstance(block, Block) and "forward" not in vars(block)
