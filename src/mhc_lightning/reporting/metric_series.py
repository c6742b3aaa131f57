"""Series of logged metrics: the values of one tag against optimizer steps."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

LOSS, VALIDATION_LOSS, GRADIENT_NORM = "train/loss", "val/loss", "train/grad_norm"
SPEED, MEMORY = "train/tokens_per_second", "train/peak_memory_bytes"


@dataclass(frozen=True, eq=False)
class Series:
    """The values of one tag; steps ascend, each once.

    Attributes:
        steps: int64 [k], optimizer steps completed.
        values: float64 [k]; may hold NaN and infinities.
    """

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, steps: Iterable[int], values: Iterable[float]) -> "Series":
        """A series from points in the order of logging; the last value of a step counts."""
        steps_array = np.fromiter(steps, dtype=np.int64)
        order = np.argsort(steps_array, kind="stable")
        steps_array = steps_array[order]
        values_array = np.fromiter(values, dtype=np.float64)[order]
        # [k], True at the last point of each step
        is_last = np.ones(len(steps_array), dtype=bool)
        is_last[:-1] = steps_array[1:] != steps_array[:-1]
        return cls(steps_array[is_last], values_array[is_last])

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> "Series":
        """The points whose value is a number."""
        is_finite = np.isfinite(self.values)
        return Series(self.steps[is_finite], self.values[is_finite])

    def minus(self, other: "Series") -> "Series":
        """Differences at the steps that both series have."""
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
    """A metric that is logged for every sub-layer, as one matrix.

    Args:
        scalars: Series by tag.
        tag: The tag to which `/layer_<k>` is added.

    Returns:
        The sub-layers [L] ascending, int64 steps [T], and values [L, T], NaN where none was logged.
    """
    prefix = f"{tag}/layer_"
    by_layer = {
        int(name.removeprefix(prefix)): series
        for name, series in scalars.items()
        if name.startswith(prefix) and name.removeprefix(prefix).isdigit() and len(series)
    }
    layers = sorted(by_layer)
    if not layers:
        return [], np.zeros(0, dtype=np.int64), np.zeros((0, 0))
    steps = np.unique(np.concatenate([by_layer[k].steps for k in layers]))
    values = np.full((len(layers), len(steps)), np.nan)
    for row, k in enumerate(layers):
        values[row, np.searchsorted(steps, by_layer[k].steps)] = by_layer[k].values
    return layers, steps, values
