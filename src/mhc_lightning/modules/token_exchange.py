"""The way of token copies to routed experts and back; here every expert is at home.

Shapes: R copies of tokens of this process, one for each chosen expert; A copies that arrive at the
experts of this process; E experts, of which H are at home; C width.

A mixture of experts asks its exchange to begin a way and waits for its end later. So a strategy
that has experts on other processes puts an exchange of its own in the place of this one
(`MixtureOfExperts.exchange`), and what lies between beginning and end runs while copies travel.
"""

from typing import Protocol

import torch
from torch import Tensor


class Visit(Protocol):
    """One pass of token copies through the experts. Each method is called once, in this order."""

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Wait for the copies at the experts of this process.

        Returns:
            The copies [A, C], sorted by expert; and the end of each expert's run [H], int32.
        """
        ...

    def begin_return(self, rows: Tensor) -> None:
        """Send results [A, C] back, in the order of the copies."""
        ...

    def returned(self) -> Tensor:
        """Wait for the results [R, C] of the copies that this process has sent, in their order."""
        ...


class TokenExchange(Protocol):
    """Brings token copies to their experts and back."""

    def begin(self, rows: Tensor, counts: Tensor) -> Visit:
        """Send copies to their experts.

        Args:
            rows: The copies [R, C], sorted by expert.
            counts: The copies for each expert [E], int64.
        """
        ...

    def held(self, weights: Tensor) -> Tensor:
        """The weights [H, ...] of the experts at home, of those of all experts [E, ...]."""
        ...


class AtHome:
    """A `TokenExchange` of a process that has all experts: nothing moves."""

    def begin(self, rows: Tensor, counts: Tensor) -> Visit:
        """Take the copies as they are."""
        return _StayAtHome(rows, counts)

    def held(self, weights: Tensor) -> Tensor:
        """All weights."""
        return weights


class _StayAtHome:
    def __init__(self, rows: Tensor, counts: Tensor) -> None:
        self._rows, self._counts = rows, counts

    def arrive(self) -> tuple[Tensor, Tensor]:
        return self._rows, self._counts.cumsum(0).to(torch.int32)

    def begin_return(self, rows: Tensor) -> None:
        self._rows = rows

    def returned(self) -> Tensor:
        return self._rows
