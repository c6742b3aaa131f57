"""One logged number against optimizer steps."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Series:
    """Values of one tag; steps ascend and none is repeated.

    Attributes:
        steps: int64 [k], optimizer steps completed.
        values: float64 [k]; may hold NaN and infinities.
    """

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, steps: Iterable[int], values: Iterable[float]) -> "Series":
        """From points in the order they were logged; the last one of a step counts."""
        at = np.fromiter(steps, dtype=np.int64)
        order = np.argsort(at, kind="stable")
        at, numbers = at[order], np.fromiter(values, dtype=np.float64)[order]
        last = np.append(at[1:] != at[:-1], True) if len(at) else np.zeros(0, dtype=bool)
        return cls(at[last], numbers[last])

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> "Series":
        """The points whose value is a number."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])

    def minus(self, other: "Series") -> "Series":
        """The differences at the steps that both have."""
        steps, mine, theirs = np.intersect1d(
            self.steps, other.steps, assume_unique=True, return_indices=True
        )
        return Series(steps, self.values[mine] - other.values[theirs])

    def smoothed(self, width: int) -> "Series":
        """Centred running means over `width` points (rounded up to odd), fewer at the ends."""
        half = width // 2
        if half == 0 or len(self) == 0:
            return self
        sums = np.concatenate([[0.0], np.cumsum(self.values)])
        index = np.arange(len(self))
        reach = np.minimum(np.minimum(index, len(self) - 1 - index), half)
        means = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
        return Series(self.steps, means)


def layer_matrix(
    scalars: Mapping[str, Series], tag: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """A number that is logged for every sub-layer, as one matrix.

    Args:
        scalars: Series by tag.
        tag: The tag that ``/layer_<k>`` is added to.

    Returns:
        The sub-layers [L] ascending, int64 steps [T], and values [L, T], NaN where none was logged.
    """
    prefix = f"{tag}/layer_"
    found = {
        int(name[len(prefix) :]): series
        for name, series in scalars.items()
        if name.startswith(prefix) and name[len(prefix) :].isdigit() and len(series)
    }
    layers = sorted(found)
    if not layers:
        return [], np.zeros(0, dtype=np.int64), np.zeros((0, 0))
    steps = np.unique(np.concatenate([found[k].steps for k in layers]))
    values = np.full((len(layers), len(steps)), np.nan)
    for row, k in enumerate(layers):
        values[row, np.searchsorted(steps, found[k].steps)] = found[k].values
    return layers, steps, values
