"""The band of a series' recent values: their median and median absolute deviation."""

import math
import statistics
from collections import deque
from typing import NamedTuple

from mhc_lightning.errors import UserError

# The median absolute deviation of a normal distribution is its standard deviation over this.
_NORMAL = 1.4826


class Breach(NamedTuple):
    """A value out of its band, with the band.

    Attributes:
        tag: The metric.
        value: The value; may be NaN or infinite.
        bound: The largest ordinary value; None if there was no bound yet: then only a value that
            is not finite is a breach.
        median: The median of the values before; None if there are too few, or the limit decided.
        deviation: Their median absolute deviation, as a standard deviation; None as above.
        seen: The number of values before.
    """

    tag: str
    value: float
    bound: float | None
    median: float | None
    deviation: float | None
    seen: int

    def __str__(self) -> str:
        """For people: `train/loss 9.31 above 3.9 (the last 128: median 2.1, deviation 0.2)`."""
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
    enters the window. A lasting level becomes the band after half a window. `rise` prevents
    breaches by rounding in a nearly constant series, and by the tail in a heavy-tailed series. Only
    rising values breach: falling losses, norms and gains are no explosion.

    Args:
        tag: Name of the series.
        window: The number of values from which the band is computed.
        least: The number of values before the band judges.
        deviations: Robust standard deviations above the median that are ordinary.
        rise: The share of |median| above the median that is always ordinary.
        limit: An absolute bound from the first value on; None sets none.

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
        """Judge a value by those before it, and add it to the window if it is finite."""
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
