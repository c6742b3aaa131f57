"""The shuffled order of training sequences: a pure function of (seed, epoch, position).

There is no state between calls, so workers, ranks, stops and epoch boundaries cannot change the
order. Random numbers are raw Philox output, which NumPy keeps stable between versions.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_MIXTURE_BLOCK = 10_000


def permutation(length: int, *key: int | str) -> np.ndarray:
    """The permutation of `range(length)` that a key identifies, int64 [length]."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))
    return np.argsort(generator.random_raw(length), kind="stable")


class EpochOrder:
    """Endless passes over one source, each pass in an order of its own.

    A pass permutes the chunks and then the sequences within each window of consecutive chunks, so
    that only a window of chunks is in use at a time.

    Args:
        sequences: Number of sequences in each chunk.
        window: Chunks per window.
        key: Identifies the order, such as the seed and the source.
    """

    def __init__(self, sequences: Sequence[int], window: int, key: str) -> None:
        self.sequences = np.asarray(sequences, dtype=np.int64)
        self.length = int(self.sequences.sum())
        self.window = window
        self.key = key
        self._epoch = lru_cache(maxsize=2)(self._compute_epoch)
        self._window = lru_cache(maxsize=3)(self._compute_window)

    def __getstate__(self) -> dict[str, object]:
        return {"sequences": self.sequences, "window": self.window, "key": self.key}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # caches cannot be pickled

    def locate(self, index: int) -> tuple[int, int]:
        """The (chunk, sequence within it) at an index of the endless order."""
        epoch, position = divmod(index, self.length)
        window = self._window_number(epoch, position)
        chunks, ends, order = self._window(epoch, window)
        sequence = int(order[position - self._epoch(epoch)[1][window]])
        place = int(np.searchsorted(ends, sequence, side="right"))
        return int(chunks[place]), sequence - int(ends[place] - self.sequences[chunks[place]])

    def window_at(self, index: int) -> tuple[int, int]:
        """The (epoch, window) of an index."""
        epoch, position = divmod(index, self.length)
        return epoch, self._window_number(epoch, position)

    def chunks_of(self, epoch: int, window: int) -> list[int]:
        """The chunks of a window; past an epoch's last window comes the next epoch's first."""
        chunks, starts = self._epoch(epoch)
        if window >= len(starts) - 1:
            return self.chunks_of(epoch + 1, 0)
        return [int(chunk) for chunk in chunks[window * self.window : (window + 1) * self.window]]

    def _window_number(self, epoch: int, position: int) -> int:
        starts = self._epoch(epoch)[1]
        return int(np.searchsorted(starts, position, side="right")) - 1

    def _compute_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunks in the epoch's order, and the position at which each window starts."""
        chunks = permutation(len(self.sequences), self.key, epoch)
        chunks = chunks[self.sequences[chunks] > 0]
        ends = np.cumsum(self.sequences[chunks])
        last = np.append(np.arange(self.window, len(chunks), self.window), len(chunks)) - 1
        return chunks, np.concatenate([[0], ends[last]])

    def _compute_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The chunks of a window, the running sum of their sequences, and the sequences' order."""
        chunks = self._epoch(epoch)[0][window * self.window : (window + 1) * self.window]
        ends = np.cumsum(self.sequences[chunks])
        return chunks, ends, permutation(int(ends[-1]), self.key, epoch, window)


class Mixture:
    """The source of each position of the training stream, and its index within that source.

    Every block of 10,000 positions holds each source in proportion to its weight, in an order of
    its own.

    Args:
        weights: One positive weight per source.
        key: Identifies the order.
    """

    def __init__(self, weights: Sequence[float], key: str) -> None:
        self.key = key
        self.counts = apportion(_MIXTURE_BLOCK, weights)
        self._block = lru_cache(maxsize=2)(self._compute_block)
        self.weights = list(weights)

    def __getstate__(self) -> dict[str, object]:
        return {"weights": self.weights, "key": self.key}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # the cache cannot be pickled

    def locate(self, position: int) -> tuple[int, int]:
        """The (source, index in the endless order of that source) at a position."""
        if len(self.counts) == 1:
            return 0, position
        block, offset = divmod(position, _MIXTURE_BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[offset])
        return source, block * int(self.counts[source]) + int(ranks[offset])

    def drawn(self, position: int) -> list[int]:
        """Number of sequences of each source before a position."""
        if len(self.counts) == 1:
            return [position]
        block, offset = divmod(position, _MIXTURE_BLOCK)
        before = np.bincount(self._block(block)[0][:offset], minlength=len(self.counts))
        return [int(number) for number in block * self.counts + before]

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        sources = sources[permutation(_MIXTURE_BLOCK, self.key, block)]
        ranks = np.empty_like(sources)
        for source in range(len(self.counts)):
            places = np.flatnonzero(sources == source)
            ranks[places] = np.arange(len(places))
        return sources, ranks


def apportion(total: int, weights: Sequence[float]) -> np.ndarray:
    """Divide a number in proportion to weights (largest remainder), int64 [len(weights)].

    Each share is at least one, as far as the total allows.
    """
    shares = np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum() * total
    counts = np.maximum(np.floor(shares), 1).astype(np.int64)
    while counts.sum() > total:
        counts[np.argmax(counts)] -= 1
    order = np.argsort(counts - shares, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts
