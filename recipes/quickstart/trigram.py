"""A byte trigram with modified Kneser-Ney smoothing: what a language model has to beat.

Chen and Goodman (1998), section 3: each order gives up a discount per count (one discount for
counts of one, of two, and of three or more, estimated from the counts of counts) in favour of the
next shorter context, whose counts are numbers of distinct predecessors. The shortest context falls
back to the uniform distribution, so no symbol is impossible.
"""

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


class _Order:
    """Discounted counts of the symbols that follow each context.

    Args:
        counts: How often each symbol follows each context, [contexts, symbols].
    """

    def __init__(self, counts: Integers) -> None:
        ones, twos, threes, fours = (int(np.count_nonzero(counts == k)) for k in (1, 2, 3, 4))
        share = ones / max(ones + 2 * twos, 1)
        self.discount = np.array(
            [
                0.0,
                1 - 2 * share * twos / max(ones, 1),
                max(0.0, 2 - 3 * share * threes / max(twos, 1)),
                max(0.0, 3 - 4 * share * fours / max(threes, 1)),
            ]
        )
        self.counts = counts
        self.total = counts.sum(axis=1)
        # The mass that each context gives up: its discounts, added up.
        self.released = sum(
            self.discount[k] * np.count_nonzero(counts == k if k < 3 else counts >= 3, axis=1)
            for k in (1, 2, 3)
        )

    def probability(self, context: Integers, symbol: Integers, shorter: Floats) -> Floats:
        """Probability of each symbol, given what the shorter context says of it."""
        count = self.counts[context, symbol]
        kept = count - self.discount[np.minimum(count, 3)]
        total = self.total[context]
        seen = (kept + self.released[context] * shorter) / np.maximum(total, 1)
        return np.where(total > 0, seen, shorter)


class Trigram:
    """Predicts each symbol from the two before it.

    Args:
        symbols: The training text as integers in [0, vocabulary), one dimension.
        vocabulary: Number of different symbols.
    """

    def __init__(self, symbols: Integers, vocabulary: int = 257) -> None:
        v = self.vocabulary = vocabulary
        codes = symbols[2:] + v * (symbols[1:-1] + v * symbols[:-2])
        trigrams = np.bincount(codes, minlength=v**3).reshape(v, v, v)
        bigrams = np.count_nonzero(trigrams, axis=0)
        unigrams = np.count_nonzero(bigrams, axis=0)
        self._third = _Order(trigrams.reshape(v * v, v))
        self._second = _Order(bigrams)
        self._first = _Order(unigrams.reshape(1, v))

    def probability(self, before: Integers, last: Integers, symbol: Integers) -> Floats:
        """Probability that `symbol` follows `before`, `last`; integer arrays of one shape."""
        uniform = np.full(symbol.shape, 1 / self.vocabulary)
        first = self._first.probability(np.zeros_like(symbol), symbol, uniform)
        second = self._second.probability(last, symbol, first)
        return self._third.probability(before * self.vocabulary + last, symbol, second)

    def bits(self, symbols: Integers) -> float:
        """Bits to encode a text, given its first two symbols."""
        return float(-np.log2(self.probability(symbols[:-2], symbols[1:-1], symbols[2:])).sum())
