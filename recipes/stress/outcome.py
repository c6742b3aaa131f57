"""The outcome of one run under stress: trained or failed, judged by its logged losses."""

from dataclasses import dataclass

import numpy as np

from mhc_lightning.reporting.metric_series import Series

MARGIN = 0.5
"""Nats by which a loss may lie above what it is compared with."""

TRAINED, NOT_FINITE, FORGOT, STALLED = "trained", "not finite", "forgot", "stalled"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        state: `trained`; `not finite`: the loss stopped being a number; `forgot`: it ended
            more than `MARGIN` above what the same run had reached; `stalled`: it ended more than
            `MARGIN` above the best run with a lower learning rate, or less than that below its own
            first loss.
        loss: Mean of the last tenth of the logged losses; infinite if not finite.
        lowest: The lowest mean over as many losses in a row.
    """

    state: str
    loss: float
    lowest: float

    @property
    def stable(self) -> bool:
        """True if this learning rate can be used."""
        return self.state == TRAINED


def judge(losses: Series, stopped: bool, best: float) -> Outcome:
    """Judge a run.

    Args:
        losses: Its training losses, in nats per token.
        stopped: Whether it was stopped because the loss was not finite.
        best: The lowest `Outcome.loss` of runs that differ in a lower learning rate alone;
            infinite if there is none.
    """
    values = losses.values
    if stopped or len(values) == 0 or not np.isfinite(values).all():
        return Outcome(NOT_FINITE, float("inf"), _lowest(values[np.isfinite(values)]))
    loss, lowest = float(values[-_width(values) :].mean()), _lowest(values)
    if loss > lowest + MARGIN:
        return Outcome(FORGOT, loss, lowest)
    stalled = loss > min(best + MARGIN, float(values[0]) - MARGIN)
    return Outcome(STALLED if stalled else TRAINED, loss, lowest)


def _width(values: np.ndarray) -> int:
    return max(1, len(values) // 10)


def _lowest(values: np.ndarray) -> float:
    if len(values) == 0:
        return float("inf")
    width = _width(values)
    return float(np.convolve(values, np.full(width, 1 / width), mode="valid").min())
