"""What a module shows of a memory of n-grams, and what is kept of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhc_lightning.errors import UserError


class MemoryReading(NamedTuple):
    """What one call of a module shows of a memory of n-grams; None for what it does not show.

    Attributes:
        place: Where the memory acts, as tags name it: `layer_<k>`, or `input`.
        gate: [..., n], how far it opens to each stream.
        rows: int64 [..., H], the row that each head reads; no two heads share one. They come with
            `suffixes` and `orders`.
        suffixes: int64 [..., N], the last tokens as the hash sees them, the newest first.
        orders: How many of them the n-gram of each head has [H].
        streams: [...], the streams (or the embedding) that it adds to.
        result: [...], the same with what it adds.
    """

    place: str
    gate: Tensor | None = None
    rows: Tensor | None = None
    suffixes: Tensor | None = None
    orders: tuple[int, ...] = ()
    streams: Tensor | None = None
    result: Tensor | None = None


ExtractReading = Callable[[nn.Module, tuple[Any, ...], Any], MemoryReading | None]
"""From (module, arguments, output) of one call to what it shows, or None for other modules.

The arguments are the positional ones followed by the values of the keyword ones.
"""


class MemorySight(NamedTuple):
    """A `MemoryReading` without what is too large to keep.

    Attributes:
        place: As there.
        gate: [n], the mean over positions.
        added: [], the norm of what is added, over that of the streams.
        rows: As there, with `suffixes` and `orders`.
        suffixes: As there.
        orders: As there.
    """

    place: str
    gate: Tensor | None = None
    added: Tensor | None = None
    rows: Tensor | None = None
    suffixes: Tensor | None = None
    orders: tuple[int, ...] = ()


def mean_gate(gate: Tensor) -> Tensor:
    """Gates [..., n] -> their mean over positions [n], in at least float32."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return wide.reshape(-1, gate.shape[-1]).mean(0)


def added_norm(streams: Tensor, result: Tensor) -> Tensor:
    """‖result - streams‖ / ‖streams‖ over all elements, in at least float32."""
    dtype = torch.promote_types(streams.dtype, torch.float32)
    streams, result = streams.to(dtype), result.to(dtype)
    norms = [torch.linalg.vector_norm(x) for x in (result - streams, streams)]
    return norms[0] / norms[1].clamp_min(torch.finfo(dtype).tiny)


def condensed(reading: Any, module: str) -> MemorySight:
    """A reading without what is too large to keep.

    Args:
        reading: A `MemoryReading`.
        module: The module that showed it, for error messages.

    Raises:
        UserError: It is no `MemoryReading`, or its rows do not fit its suffixes and orders.
    """
    if not isinstance(reading, MemoryReading):
        raise UserError(
            f"extract returned a {type(reading).__name__} for a {module}; return a MemoryReading,"
            " or None for modules that are not of interest"
        )
    place, gate, rows, suffixes, orders, streams, result = reading
    if rows is not None:
        _check_rows(rows, suffixes, orders, module)
    return MemorySight(
        place,
        None if gate is None else mean_gate(gate),
        None if streams is None or result is None else added_norm(streams, result),
        rows,
        suffixes,
        orders,
    )


def _check_rows(
    rows: Tensor, suffixes: Tensor | None, orders: tuple[int, ...], module: str
) -> None:
    longest = 0 if suffixes is None else suffixes.shape[-1]
    fits = suffixes is not None and rows.shape[:-1] == suffixes.shape[:-1]
    if not fits or rows.shape[-1] != len(orders) or not all(1 <= n <= longest for n in orders):
        raise UserError(
            f"extract returned for a {module} rows of shape {tuple(rows.shape)}, suffixes of shape"
            f" {None if suffixes is None else tuple(suffixes.shape)} and orders {list(orders)};"
            " rows [..., H] need suffixes [..., N] and H orders from 1 to N"
        )
