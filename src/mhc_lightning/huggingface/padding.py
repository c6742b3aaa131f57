"""Padding moved to the end of rows, where a causal network does not see it.

Shapes: B batch, S sequence, K positions asked for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mhc_lightning.errors import UserError


class Padding:
    """Which positions of a batch are padding, wherever they are.

    A network numbers positions from a row's first token and attends to everything before a token.
    So a row's tokens are moved to its beginning, and what was computed is moved back.

    Args:
        mask: [B, T] with T ≥ S, not zero where there is a token; None if there are tokens
            everywhere. Its last S columns are those of the batch.
        shape: (B, S).

    Attributes:
        mask: bool [B, S]; None if there is no padding.

    Raises:
        UserError: The mask has another shape.
    """

    def __init__(self, mask: Tensor | None, shape: torch.Size) -> None:
        batch, length = shape
        if mask is not None and (
            mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length
        ):
            raise UserError(
                f"attention_mask is {list(mask.shape)}; for input_ids {list(shape)} it must be"
                f" [{batch}, {length}], 1 for tokens and 0 for padding"
            )
        cut = None if mask is None else mask[:, mask.shape[1] - length :] != 0
        self.mask = None if cut is None or cut.all() else cut
        self._shape = shape
        self._order: Tensor | None = None
        if self.mask is not None:
            self._order = (~self.mask).to(torch.int8).argsort(dim=1, stable=True)

    def to_end(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] with those of each row first."""
        return tokens if self._order is None else tokens.gather(1, self._order)

    def counts(self, device: torch.device) -> Tensor:
        """Number of tokens of each row [B], int64."""
        if self.mask is None:
            return torch.full((self._shape[0],), self._shape[1], device=device)
        return self.mask.sum(1)

    def take(self, values: Tensor, kept: Tensor | slice) -> Tensor:
        """Values [B, S, ...], computed after `to_end`, at the `kept` positions of the batch.

        Returns:
            [B, K, ...]; at padding they have no meaning.
        """
        if self._order is None:
            return values[:, kept]
        places = self._order.argsort(dim=1)[:, kept]
        return values[torch.arange(len(values), device=values.device)[:, None], places]

    def predictable(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels [B, S] without a row's first token where padding would have to predict it."""
        if self.mask is None:
            return labels
        behind_padding = self.mask & ~F.pad(self.mask, (1, -1), value=True)
        return labels.masked_fill(behind_padding.to(labels.device), ignore_index)
