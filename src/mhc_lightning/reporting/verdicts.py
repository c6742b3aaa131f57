"""A verdict on a run in plain words, from a few rules; nothing is said of what was not logged.

The rules, in this order:

1. A loss or gradient norm that was logged as NaN or infinite, or a run that ended for that reason:
   *diverged*.
2. A gain above 2, or below 1/2 in some sub-layer, has left 1: *unsteady*. The thresholds are this
   package's; the paper reports about 1.6 for mHC's composite backward gain and 3000 for HC's.
3. A training loss that ends above its own lowest, both as means over as many steps as the final
   window has, by more than their intervals can explain and by more than 5% of what it had come
   down: *unsteady*.
4. A gradient norm that, after the first tenth of the logged steps, exceeds 10 times its median:
   *unsteady*.
5. Gains and loss were logged and none of this: *steady*. Without gains: *finite*.

Rules 2 to 4 also speak of diverged runs. The comparison with a baseline is told, not judged.
"""

from dataclasses import dataclass

import numpy as np

from mhc_lightning.formatting import (
    format_difference,
    format_gain,
    format_list,
    format_number,
    format_steps,
    format_sub_layers,
)
from mhc_lightning.reporting import run_description
from mhc_lightning.reporting.gain_extremes import DIRECTIONS, KINDS, Extreme, GainRange, gain_tag
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.metric_series import Series
from mhc_lightning.reporting.summary import AT_ONE, GRADIENT, LIMIT, LOSS, Gap, Summary

RISE_SHARE = 0.05
"""Rule 3: of what the loss had come down."""
SPIKE = 10.0
"""Rule 4: times the median gradient norm."""
DOUBLY_STOCHASTIC = 1e-3
"""Row sums this near to 1 are taken for those of a constrained connection."""

DIVERGED, UNSTEADY, STEADY, FINITE, OPEN = (
    "diverged",
    "unsteady",
    "steady",
    "finite",
    "not judged",
)


@dataclass(frozen=True)
class Verdict:
    """What the data say of a run.

    Attributes:
        state: diverged, unsteady, steady, finite, or not judged.
        reasons: Why it is unsteady, in a word or two each.
        sentences: Findings, the gravest first.
        not_judged: What was not logged.
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
    left, fine = _judge_gains(summary)
    findings = {
        "gains left 1": left,
        "loss rose": _rise(summary),
        "gradient spike": _spike(run),
    }
    bad = [sentence for sentences in findings.values() for sentence in sentences]
    reasons = [reason for reason, sentences in findings.items() if sentences]
    logged = [name for name, tag in (("loss", LOSS), ("gradient norm", GRADIENT)) if _has(run, tag)]
    missing = [
        name
        for name, present in (
            ("training loss", _has(run, LOSS)),
            ("validation loss", summary.validation is not None),
            ("gradient norm", _has(run, GRADIENT)),
            ("gains", bool(summary.gains)),
            ("stream diversity", _has(run, "stream_diversity/mean")),
            ("Sinkhorn residual", _has(run, "sinkhorn_residual/column")),
        )
        if not present
    ]
    if diverged:
        state = DIVERGED
    elif bad:
        state = UNSTEADY
    elif summary.gains and _has(run, LOSS):
        state = STEADY
    else:
        state = FINITE if logged else OPEN
    calm = []
    if not diverged and logged:
        verb = "were" if len(logged) > 1 else "was"
        calm = [f"{format_list(logged).capitalize()} {verb} finite at every logged step."]
    told = [*diverged, *bad, *calm, *fine, *_streams(summary), *_comparison(summary.gap)]
    return Verdict(state, reasons if state == UNSTEADY else [], told, missing)


def _has(run: LoggedRun, tag: str) -> bool:
    return tag in run.scalars and len(run.scalars[tag]) > 0


def _divergence(summary: Summary) -> list[str]:
    found = []
    if summary.not_finite is not None:
        step, name = summary.not_finite
        found.append(f"The {name} was not finite at step {step:,}.")
    if summary.ending[0] == "diverged":
        found.append(summary.ending[1])
    return found


def _judge_gains(summary: Summary) -> tuple[list[str], list[str]]:
    """Sentences on gains that left 1, and on those that did not."""
    bad, fine, at_one = [], [], []
    for kind in KINDS:
        for direction in DIRECTIONS:
            found = summary.gains.get(gain_tag(kind, direction))
            if found is None:
                continue
            name = f"{kind.replace('single', 'single-layer')} {direction} gain"
            sentences = _left_one(name, found)
            bad += sentences
            if found.distance <= AT_ONE:
                at_one.append(name.removesuffix(" gain"))
            elif not sentences:
                fine.append(
                    f"{name.capitalize()} stayed near 1: largest"
                    f" {format_gain(found.largest.value)}, at step {found.largest.step:,}"
                    f"{_in_one(found.largest)}."
                )
    if at_one:
        subject = f"{format_list(at_one).capitalize()} gain{'s' if len(at_one) > 1 else ''}"
        if len(at_one) == len(KINDS) * len(DIRECTIONS):
            subject = "All gains"
        fine.insert(0, f"{subject} stayed at 1 (to {AT_ONE:g}).")
    return bad, fine


def _left_one(name: str, found: GainRange) -> list[str]:
    sentences = []
    largest, smallest = found.largest, found.smallest
    if largest.value > LIMIT:
        since = ""
        if found.left is not None and found.left < largest.step:
            since = f"; it first passed {LIMIT:g} at step {found.left:,}"
        reached = "reached" if np.isfinite(largest.value) else "became"
        sentences.append(f"{name.capitalize()} {reached} {_where(largest)}{since}.")
    if smallest is not None and smallest.value < 1 / LIMIT:
        sentences.append(f"{name.capitalize()} fell to {_where(smallest)}.")
    return sentences


def _where(extreme: Extreme) -> str:
    place = format_sub_layers(extreme.first_layer, extreme.last_layer)
    return f"{format_gain(extreme.value)} at step {extreme.step:,}{', in ' if place else ''}{place}"


def _in_one(extreme: Extreme) -> str:
    """The sub-layer of a value near 1, if it is one: a stretch of them says nothing."""
    first, last = extreme.first_layer, extreme.last_layer
    return f" in {format_sub_layers(first, last)}" if first is not None and first == last else ""


def _rise(summary: Summary) -> list[str]:
    loss, lowest, series = summary.loss, summary.lowest, summary.run.scalars.get(LOSS)
    if loss is None or lowest is None or loss.low is None or series is None:
        return []
    low, first, last = lowest
    rise, start = loss.value - low, float(series.finite().values[0])
    noise = 2 * (loss.value - loss.low)  # the lowest is as uncertain, and was chosen for being so
    if rise <= noise or rise <= RISE_SHARE * (start - low) or first == loss.first_step:
        return []
    return [
        f"The training loss rose again: it was {format_number(low)} over"
        f" {format_steps(first, last)} and ends at {format_number(loss.value)}."
    ]


def _spike(run: LoggedRun) -> list[str]:
    norm = run.scalars.get(GRADIENT)
    if norm is None:
        return []
    later = Series(norm.steps[len(norm) // 10 :], norm.values[len(norm) // 10 :]).finite()
    if len(later) == 0:
        return []
    at, median = int(later.values.argmax()), float(np.median(later.values))
    if median == 0 or later.values[at] <= SPIKE * median:
        return []
    return [
        f"The gradient norm spiked to {format_number(float(later.values[at]))} at step"
        f" {int(later.steps[at]):,}, {format_number(float(later.values[at]) / median, 2)} times its"
        " median."
    ]


def _streams(summary: Summary) -> list[str]:
    run, sentences = summary.run, []
    diversity, row, column = (
        run.scalars.get(tag)
        for tag in ("stream_diversity/mean", "sinkhorn_residual/row", "sinkhorn_residual/column")
    )
    if diversity is not None and len(diversity):
        if run_description.has_one_stream(run):
            return ["It has one stream, so there is nothing to mix."]
        if not diversity.values.any():
            return ["Its streams were equal throughout, or it has but one."]
        sentences.append(
            f"Stream diversity ends at {format_number(float(diversity.values[-1]), 2)} (0: all"
            " streams are equal)."
        )
    if row is not None and column is not None and len(row) and len(column):
        worst = float(np.max(row.values)), float(np.max(column.values))
        if worst[0] <= DOUBLY_STOCHASTIC:
            sentences.append(
                f"Rows of the mixing matrices sum to 1; column sums stayed within"
                f" {format_number(worst[1], 2)} of 1."
            )
        else:
            sentences.append(
                "The mixing matrices are not doubly stochastic: sums were up to"
                f" {format_number(max(worst), 2)} off 1."
            )
    return sentences


def _comparison(gap: Gap | None) -> list[str]:
    if gap is None or gap.loss is None:
        return []
    loss, where = gap.loss, format_steps(gap.loss.first_step, gap.loss.last_step)
    if loss.low is None:
        return [
            f"Against {gap.baseline} the training loss differs by {format_difference(loss.value)}"
            f" over {where}: too few points for an interval."
        ]
    if not loss.resolved:
        return [
            f"Against {gap.baseline} no difference in training loss is resolved over {where}:"
            f" {format_difference(loss.value)} (95%: {loss.interval})."
        ]
    side = "below" if loss.value < 0 else "above"
    return [
        f"The training loss is {format_number(abs(loss.value))} {side} that of {gap.baseline} over"
        f" {where} (95%: {loss.interval})."
    ]
