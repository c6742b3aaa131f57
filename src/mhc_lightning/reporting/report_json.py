"""A report as plain values, for JSON."""

from typing import Any

from mhc_lightning.formatting import json_value
from mhc_lightning.reporting import run_description
from mhc_lightning.reporting.gain_extremes import Extreme
from mhc_lightning.reporting.report import Report
from mhc_lightning.reporting.statistics import Estimate
from mhc_lightning.reporting.summary import Summary
from mhc_lightning.reporting.verdicts import Verdict


def record(report: Report) -> dict[str, Any]:
    """The report's numbers and verdicts; null is not logged, what is not finite is a text."""
    numbers: dict[str, Any] = {
        "baseline": None if report.baseline is None else report.baseline.name,
        "runs": [
            _run(summary, verdict)
            for summary, verdict in zip(report.summaries, report.verdicts, strict=True)
        ],
        "over_seeds": [vars(group) for group in report.seeds],
    }
    return json_value(numbers)


def _run(summary: Summary, verdict: Verdict) -> dict[str, Any]:
    gap, gradient = summary.gap, summary.gradient
    return {
        "name": summary.run.name,
        "folder": str(summary.run.folder),
        "ending": {"state": summary.ending[0], "sentence": summary.ending[1]},
        "last_step": summary.run.last_step,
        "verdict": {
            "state": verdict.state,
            "reasons": verdict.reasons,
            "sentences": verdict.sentences,
            "not_judged": verdict.not_judged,
        },
        "loss": _estimate(summary.loss),
        "validation_loss": _at_step(summary.validation),
        "gap": None
        if gap is None
        else {
            "baseline": gap.baseline,
            "same_batches": gap.same_batches,
            "loss": _estimate(gap.loss),
            "validation_loss": _at_step(gap.validation),
        },
        "gains": {
            tag: {"largest": _extreme(found.largest), "smallest": _extreme(found.smallest)}
            for tag, found in summary.gains.items()
        },
        "gradient_norm": None
        if gradient is None
        else {"median": gradient.median, "largest": gradient.largest, "step": gradient.step},
        "tokens_per_second": summary.speed,
        "peak_memory_bytes": summary.memory,
        "what_was_run": run_description.what_was_run(summary.run),
        "commands": run_description.commands(summary.run),
    }


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else vars(estimate)


def _at_step(found: tuple[int, float] | None) -> dict[str, Any] | None:
    return None if found is None else {"step": found[0], "value": found[1]}


def _extreme(extreme: Extreme | None) -> dict[str, Any] | None:
    if extreme is None:
        return None
    return {
        "value": extreme.value,
        "step": extreme.step,
        "layers": None
        if extreme.first_layer is None
        else [extreme.first_layer, extreme.last_layer],
    }
