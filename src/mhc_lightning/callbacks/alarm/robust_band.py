"""Whether a series leaves the band of its recent values: median and median deviation."""

import math
import statistics
from collections import deque
from typing import NamedTuple

from mhc_lightning.errors import UserError

# The median absolute deviation of a normal distribution is its standard deviation over this.
_NORMAL = 1.4826


class Breach(NamedTuple):
    """A value out of its band, and what the band was.

    Attributes:
        tag: Whose value it is.
        value: The value; may be NaN or infinite.
        bound: The largest value that would have been let pass; None if there was none yet, which
            only a value that is not finite or above `limit` can breach.
        median: Of the values before it; None if there are too few.
        deviation: Their median absolute deviation, as a standard deviation; None as above.
        seen: How many values before it were looked at.
    """

    tag: str
    value: float
    bound: float | None
    median: float | None
    deviation: float | None
    seen: int

    def __str__(self) -> str:
        """What happened, for people: ``train/loss 9.31 above 3.9 (median 2.1 of 128, …)``."""
        if not math.isfinite(self.value) or self.bound is None:
            return f"{self.tag} {self.value:.4g} is not finite"
        if self.median is None:
            return f"{self.tag} {self.value:.4g} above the limit {self.bound:.4g}"
        return (
            f"{self.tag} {self.value:.4g} above {self.bound:.4g} (the last {self.seen}:"
            f" median {self.median:.4g}, deviation {self.deviation:.2g})"
        )


class RobustBand:
    """Judges each value by those before it.

    A value is out of the band if it is not finite, above `limit`, or above
    median + max(`deviations` · σ, `rise` · |median|), with σ = 1.4826 · median(|value − median|)
    over the last `window` values. Medians do not follow single outliers, so every finite value
    enters the window; a level that lasts becomes the band after half a window. `rise` keeps a
    series that hardly moves from tripping over rounding, and a heavy-tailed one over its tail.
    Only rising is judged: falling losses, norms and gains are no explosion.

    Args:
        tag: Name of the series, for the evidence.
        window: Values that the band is taken from.
        least: Values that there must be before the band judges.
        deviations: How many σ above the median are ordinary.
        rise: What part of |median| above it is ordinary in any case.
        limit: An absolute bound, heeded from the first value on; None sets none.

    Attributes:
        values: The window, oldest first.

    Raises:
        UserError: A setting is out of range.
    """

    def __init__(
        self,
        tag: str,
        window: int,
        least: int,
        deviations: float,
        rise: float,
        limit: float | None = None,
    ) -> None:
        for name, value, lowest in (
            ("window", window, 8),
            ("deviations", deviations, 0),
            ("rise", rise, 0),
        ):
            if not value >= lowest:
                raise UserError(
                    f"StabilityAlarm: {name} is {value} for {tag}; give at least {lowest}"
                )
        self.tag = tag
        self.least = least
        self.deviations = deviations
        self.rise = rise
        self.limit = limit
        self.values: deque[float] = deque(maxlen=window)

    def judge(self, value: float) -> Breach | None:
        """Judge a value by those before it, and let it join them if it is finite."""
        bound = median = deviation = None
        if len(self.values) >= self.least:
            median = statistics.median(self.values)
            deviation = _NORMAL * statistics.median(abs(v - median) for v in self.values)
            bound = median + max(self.deviations * deviation, self.rise * abs(median))
        if self.limit is not None and (bound is None or self.limit < bound):
            bound, median, deviation = self.limit, None, None
        seen = len(self.values)
        if not math.isfinite(value):
            return Breach(self.tag, value, bound, median, deviation, seen)
        self.values.append(value)
        if bound is not None and value > bound:
            return Breach(self.tag, value, bound, median, deviation, seen)
        return None
