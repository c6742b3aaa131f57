"""Engram and Over-Encoding in numpy's float64, position by position, from the papers' equations.

Shapes: S sequence, n streams, C width of the network, E width of all rows of a position together.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEAST_SCORE = 1e-6
CONV_EPS = 1e-5


class EngramWeights(NamedTuple):
    """The weights of Engram in one block.

    Attributes:
        key: [n, C, E], a projection of each stream.
        key_bias: [n, C].
        value: [C, E], one for all streams.
        value_bias: [C].
        key_norm: [n, C].
        stream_norm: [n, C].
        conv: [n, C, kernel], the present position last; None without a convolution.
        conv_norm: [n, C].
    """

    key: Array
    key_bias: Array
    value: Array
    value_bias: Array
    key_norm: Array
    stream_norm: Array
    conv: Array | None
    conv_norm: Array | None


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """[C] -> [C]."""
    return x / np.sqrt(np.mean(x * x) + eps) * weight


def gate(score: float) -> float:
    """Sigmoid of the signed square root."""
    root = np.sign(score) * np.sqrt(max(abs(score), LEAST_SCORE))
    return float(1 / (1 + np.exp(-root)))


def gate_slope(score: float) -> float:
    """d gate / d score: 0 where the root is flat, up to 125 beside it."""
    if abs(score) < LEAST_SCORE:
        return 0.0
    return gate(score) * (1 - gate(score)) / (2 * np.sqrt(abs(score)))


def engram(
    streams: Array, rows: Array, weights: EngramWeights, dilation: int, norm_eps: float
) -> Array:
    """Streams [S, n, C] and rows [S, E] -> streams [S, n, C]."""
    length, num_streams, dim = streams.shape
    gated, normed = np.zeros_like(streams), np.zeros_like(streams)
    for t in range(length):
        value = weights.value @ rows[t] + weights.value_bias
        for m in range(num_streams):
            key = weights.key[m] @ rows[t] + weights.key_bias[m]
            query = rms_norm(streams[t, m], weights.stream_norm[m], norm_eps)
            score = query @ rms_norm(key, weights.key_norm[m], norm_eps) / np.sqrt(dim)
            gated[t, m] = gate(score) * value
            if weights.conv_norm is not None:
                normed[t, m] = rms_norm(gated[t, m], weights.conv_norm[m], CONV_EPS)
    added = gated.copy()
    if weights.conv is not None:
        kernel = weights.conv.shape[-1]
        for t in range(length):
            mixed = np.zeros((num_streams, dim))
            for back in range(kernel):
                if t - back * dilation >= 0:
                    mixed += weights.conv[:, :, kernel - 1 - back] * normed[t - back * dilation]
            added[t] += mixed / (1 + np.exp(-mixed))  # SiLU
    return streams + added


def over_encoding(
    x: Array, rows: list[Array], projections: list[Array], divide_word: bool
) -> Array:
    """An embedding x [S, C], rows [S, D] and a projection [C, D] of each head -> [S, C]."""
    heads = len(rows)
    out = x / (1 + heads) if divide_word else x.copy()
    for head in range(heads):
        for t in range(len(x)):
            out[t] += projections[head] @ rows[head][t] / (1 + heads)
    return out
