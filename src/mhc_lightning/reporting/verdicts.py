"""Verdicts: each run judged by a few rules, in plain sentences; only logged metrics are judged.

The rules, in this order:

1. A loss or gradient norm was NaN or infinite, or the run ended for that reason: *diverged*.
2. A gain exceeded 2, or fell below 1/2 in some sub-layer: *unsteady*. The thresholds are this
   package's; the paper reports about 1.6 for mHC's composite backward gain and 3000 for HC's.
3. The training loss ended above its own lowest mean (over as many steps as the final window) by
   more than the intervals explain and by more than 5% of its descent: *unsteady*.
4. The gradient norm, after the first tenth of the logged steps, exceeded 10 times its median:
   *unsteady*.
5. Gains and loss were logged and none of this happened: *steady*. Without gains: *finite*.

Rules 2 to 4 add sentences about diverged runs, too. The comparison with a baseline is a sentence,
and changes no verdict.
"""

from dataclasses import dataclass

import numpy as np

from mhc_lightning.formatting import (
    format_difference,
    format_gain,
    format_list,
    format_number,
    format_steps,
)
from mhc_lightning.reporting.baselines import Gap
from mhc_lightning.reporting.gain_extremes import DIRECTIONS, KINDS, Extreme, GainRange, gain_tag
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.metric_series import GRADIENT_NORM, LOSS, Series
from mhc_lightning.reporting.run_description import DIVERGED as ENDED_DIVERGED
from mhc_lightning.reporting.run_description import has_one_stream
from mhc_lightning.reporting.summary import AT_ONE, LIMIT, Summary

RISE_SHARE = 0.05
"""Rule 3: share of the loss's descent."""
SPIKE = 10.0
"""Rule 4: multiple of the median gradient norm."""
DOUBLY_STOCHASTIC = 1e-3
"""Row sums this near to 1 count as those of a constrained connection."""

DIVERGED, UNSTEADY, STEADY, FINITE, NOT_JUDGED = (
    "diverged",
    "unsteady",
    "steady",
    "finite",
    "not judged",
)


@dataclass(frozen=True)
class Verdict:
    """The verdict on one run.

    Attributes:
        state: diverged, unsteady, steady, finite, or not judged.
        reasons: The reasons why it is unsteady, in two or three words each.
        sentences: Findings, the gravest first.
        not_judged: Names of metrics that were not logged.
    """

    state: str
    reasons: list[str]
    sentences: list[str]
    not_judged: list[str]

    @property
    def label(self) -> str:
        """The state, with the reasons for it."""
        return f"{self.state}: {', '.join(self.reasons)}" if self.reasons else self.state


def judge(summary: Summary) -> Verdict:
    """Apply the rules of this module."""
    run = summary.run
    diverged = _divergence(summary)
    gains_left_one, gains_near_one = _judge_gains(summary)
    unsteady = {
        "gains left 1": gains_left_one,
        "loss rose": _rise(summary),
        "gradient spike": _spike(run),
    }
    reasons = [reason for reason, sentences in unsteady.items() if sentences]
    logged = [
        name
        for name, tag in (("loss", LOSS), ("gradient norm", GRADIENT_NORM))
        if _is_logged(run, tag)
    ]
    if diverged:
        state = DIVERGED
    elif reasons:
        state = UNSTEADY
    elif summary.gains and _is_logged(run, LOSS):
        state = STEADY
    else:
        state = FINITE if logged else NOT_JUDGED
    finite = []
    if not diverged and logged:
        verb = "were" if len(logged) > 1 else "was"
        finite = [f"{format_list(logged).capitalize()} {verb} finite at every logged step."]
    sentences = [
        *diverged,
        *(sentence for found in unsteady.values() for sentence in found),
        *finite,
        *gains_near_one,
        *_streams(run),
        *_comparison(summary.gap),
    ]
    return Verdict(state, reasons if state == UNSTEADY else [], sentences, _not_logged(summary))


def _is_logged(run: LoggedRun, tag: str) -> bool:
    return tag in run.scalars and len(run.scalars[tag]) > 0


def _not_logged(summary: Summary) -> list[str]:
    logged = {
        "training loss": _is_logged(summary.run, LOSS),
        "validation loss": summary.validation is not None,
        "gradient norm": _is_logged(summary.run, GRADIENT_NORM),
        "gains": bool(summary.gains),
        "stream diversity": _is_logged(summary.run, "stream_diversity/mean"),
        "Sinkhorn residual": _is_logged(summary.run, "sinkhorn_residual/column"),
    }
    return [name for name, is_logged in logged.items() if not is_logged]


def _divergence(summary: Summary) -> list[str]:
    sentences = []
    if summary.not_finite is not None:
        step, name = summary.not_finite
        sentences.append(f"The {name} was not finite at step {step:,}.")
    if summary.ending.state == ENDED_DIVERGED:
        sentences.append(summary.ending.sentence)
    return sentences


def _judge_gains(summary: Summary) -> tuple[list[str], list[str]]:
    """Sentences on the gains that left 1, and on the others."""
    left_one, near_one, at_one = [], [], []
    for kind in KINDS:
        for direction in DIRECTIONS:
            gains = summary.gains.get(gain_tag(kind, direction))
            if gains is None:
                continue
            name = f"{kind.replace('single', 'single-layer')} {direction}"
            sentences = _left_one(f"{name} gain", gains)
            left_one += sentences
            if gains.distance <= AT_ONE:
                at_one.append(name)
            elif not sentences:
                largest = gains.largest
                is_one_layer = largest.first_layer == largest.last_layer
                place = f" in {largest.sub_layers}" if is_one_layer and largest.sub_layers else ""
                near_one.append(
                    f"{name.capitalize()} gain stayed near 1: largest"
                    f" {format_gain(largest.value)}, at step {largest.step:,}{place}."
                )
    if at_one:
        subject = f"{format_list(at_one).capitalize()} gain{'s' if len(at_one) > 1 else ''}"
        if len(at_one) == len(KINDS) * len(DIRECTIONS):
            subject = "All gains"
        near_one.insert(0, f"{subject} stayed at 1 (to {AT_ONE:g}).")
    return left_one, near_one


def _left_one(name: str, gains: GainRange) -> list[str]:
    sentences = []
    largest, smallest = gains.largest, gains.smallest
    if largest.value > LIMIT:
        first = ""
        if gains.first_above is not None and gains.first_above < largest.step:
            first = f"; it first passed {LIMIT:g} at step {gains.first_above:,}"
        verb = "reached" if np.isfinite(largest.value) else "became"
        sentences.append(f"{name.capitalize()} {verb} {_value_and_place(largest)}{first}.")
    if smallest is not None and smallest.value < 1 / LIMIT:
        sentences.append(f"{name.capitalize()} fell to {_value_and_place(smallest)}.")
    return sentences


def _value_and_place(extreme: Extreme) -> str:
    place = f", in {extreme.sub_layers}" if extreme.sub_layers else ""
    return f"{format_gain(extreme.value)} at step {extreme.step:,}{place}"


def _rise(summary: Summary) -> list[str]:
    loss, lowest, series = summary.loss, summary.lowest, summary.run.scalars.get(LOSS)
    if loss is None or lowest is None or loss.low is None or series is None:
        return []
    rise = loss.value - lowest.value
    fall = float(series.finite().values[0]) - lowest.value
    # Both means are uncertain, and selection biases the lowest one downwards.
    noise = 2 * (loss.value - loss.low)
    if rise <= noise or rise <= RISE_SHARE * fall or lowest.first_step == loss.first_step:
        return []
    return [
        f"The training loss rose again: it was {format_number(lowest.value)} over"
        f" {format_steps(lowest.first_step, lowest.last_step)} and ends at"
        f" {format_number(loss.value)}."
    ]


def _spike(run: LoggedRun) -> list[str]:
    norm = run.scalars.get(GRADIENT_NORM)
    if norm is None:
        return []
    later = Series(norm.steps[len(norm) // 10 :], norm.values[len(norm) // 10 :]).finite()
    if len(later) == 0:
        return []
    peak, median = int(later.values.argmax()), float(np.median(later.values))
    value = float(later.values[peak])
    if median == 0 or value <= SPIKE * median:
        return []
    return [
        f"The gradient norm spiked to {format_number(value)} at step {int(later.steps[peak]):,},"
        f" {format_number(value / median, 2)} times its median."
    ]


def _streams(run: LoggedRun) -> list[str]:
    sentences = []
    diversity, row, column = (
        run.scalars.get(tag)
        for tag in ("stream_diversity/mean", "sinkhorn_residual/row", "sinkhorn_residual/column")
    )
    if diversity is not None and len(diversity):
        if has_one_stream(run):
            return ["The run has one stream, so there is nothing to mix."]
        if not diversity.values.any():
            return ["The streams were equal throughout, or there is only one."]
        sentences.append(
            f"Stream diversity ends at {format_number(float(diversity.values[-1]), 2)} (0: all"
            " streams are equal)."
        )
    if row is not None and column is not None and len(row) and len(column):
        row_error, column_error = float(np.max(row.values)), float(np.max(column.values))
        if row_error <= DOUBLY_STOCHASTIC:
            sentences.append(
                f"Rows of the mixing matrices sum to 1; column sums stayed within"
                f" {format_number(column_error, 2)} of 1."
            )
        else:
            sentences.append(
                "The mixing matrices are not doubly stochastic: sums were up to"
                f" {format_number(max(row_error, column_error), 2)} off 1."
            )
    return sentences


def _comparison(gap: Gap | None) -> list[str]:
    if gap is None or gap.loss is None:
        return []
    loss, steps = gap.loss, format_steps(gap.loss.first_step, gap.loss.last_step)
    if loss.low is None:
        return [
            f"Against {gap.baseline} the training loss differs by {format_difference(loss.value)}"
            f" over {steps}: too few points for an interval."
        ]
    if not loss.resolved:
        return [
            f"Against {gap.baseline} no difference in training loss is resolved over {steps}:"
            f" {format_difference(loss.value)} (95%: {loss.interval})."
        ]
    side = "below" if loss.value < 0 else "above"
    return [
        f"The training loss is {format_number(abs(loss.value))} {side} that of {gap.baseline} over"
        f" {steps} (95%: {loss.interval})."
    ]
