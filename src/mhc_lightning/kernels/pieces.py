"""Cutting plain torch's work into pieces whose temporaries stay in a core's cache.

Temporaries of all streams would be written to fresh memory each time: the operating system's page
faults then cost more than the arithmetic.
"""

from collections.abc import Iterator

from torch import Tensor

from mhc_lightning.kernels.transforms import ordinary

_ELEMENTS = 2**18  # of a piece: a megabyte of float32
_LEAST_TOKENS = 32


def token_pieces(streams: Tensor) -> Iterator[slice]:
    """Ranges that together are all tokens of streams [T, n, C], one by one.

    Tensors without numbers, or under a transform, are not cut.
    """
    tokens, most = streams.shape[0], _tokens(streams)
    if not ordinary(streams) or tokens <= most:
        yield slice(0, tokens)
        return
    for first in range(0, tokens, most):
        yield slice(first, min(first + most, tokens))


def sequence_pieces(streams: Tensor) -> Iterator[tuple[slice, slice]]:
    """Ranges (sequences, positions) of streams [B, S, n, C]; those of a sequence ascend.

    A piece holds whole sequences, or a part of one. Tensors without numbers, or under a transform,
    are not cut.
    """
    (batch, length), most = streams.shape[:2], _tokens(streams)
    if not ordinary(streams) or batch * length <= most:
        yield slice(0, batch), slice(0, length)
        return
    together = max(1, most // length)
    for row in range(0, batch, together):
        for first in range(0, length, most):
            yield slice(row, min(row + together, batch)), slice(first, min(first + most, length))


def _tokens(streams: Tensor) -> int:
    return max(_LEAST_TOKENS, _ELEMENTS // max(1, streams.shape[-2] * streams.shape[-1]))
