"""The documents of rows that are continued again and again, as in generation.

Shapes: B rows, S new tokens of each.
"""

import torch
from torch import Tensor

from mhc_lightning.modules.documents import Documents
from mhc_lightning.modules.memory.recent import RecentWindow


class DocumentWindow:
    """Where the present document of each row began, for rows that are continued again and again.

    Args:
        batch_size: B.
        end_of_document: The token that ends a document.
        device: The device of the tokens.
    """

    def __init__(self, batch_size: int, end_of_document: int, device: torch.device) -> None:
        self._end = end_of_document
        self._lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # The last token, and where its document began: before the first there is none.
        none = torch.full((batch_size, 1), -1, dtype=torch.int64, device=device)
        self._tokens = RecentWindow(none)
        self._starts = RecentWindow(torch.zeros_like(none))

    def extend(self, tokens: Tensor) -> Documents:
        """The documents of new tokens [B, S], of which some may be padding."""
        seen = self._tokens.extend(tokens)
        places = self._lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        begins = torch.where(seen[:, :-1] == self._end, places, 0)
        starts = torch.maximum(begins.cummax(1).values, self._starts.values)
        self._starts.extend(starts)
        return Documents(starts, places)

    def advance(self, counts: Tensor, most: int) -> None:
        """Count the first `counts` [B] of the new tokens, each at most `most`."""
        self._tokens.advance(counts, most)
        self._starts.advance(counts, most)
        self._lengths = self._lengths + counts

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows [K] only."""
        self._tokens.keep(rows)
        self._starts.keep(rows)
        self._lengths = self._lengths[rows]
