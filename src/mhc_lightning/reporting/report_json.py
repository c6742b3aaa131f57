"""The report as plain values, for `report.json` and `--json`."""

from typing import Any

from mhc_lightning.formatting import json_value
from mhc_lightning.reporting.gain_extremes import Extreme
from mhc_lightning.reporting.report import Report
from mhc_lightning.reporting.run_description import commands, describe_run
from mhc_lightning.reporting.summary import Summary
from mhc_lightning.reporting.verdicts import Verdict


def report_values(report: Report) -> dict[str, Any]:
    """The report's numbers and verdicts.

    What was not logged is None; numbers that are not finite are texts.
    """
    values: dict[str, Any] = {
        "baseline": None if report.baseline is None else report.baseline.name,
        "runs": [
            _run_values(summary, verdict)
            for summary, verdict in zip(report.summaries, report.verdicts, strict=True)
        ],
        "over_seeds": [vars(gap) for gap in report.over_seeds],
    }
    return json_value(values)


def _run_values(summary: Summary, verdict: Verdict) -> dict[str, Any]:
    gap = summary.gap
    return {
        "name": summary.run.name,
        "folder": str(summary.run.folder),
        "ending": summary.ending._asdict(),
        "last_step": summary.run.last_step,
        "verdict": vars(verdict),
        "loss": _fields(summary.loss),
        "validation_loss": _point(summary.validation),
        "gap": None
        if gap is None
        else {
            "baseline": gap.baseline,
            "same_batches": gap.same_batches,
            "loss": _fields(gap.loss),
            "validation_loss": _point(gap.validation),
        },
        "gains": {
            tag: {"largest": _extreme(gains.largest), "smallest": _extreme(gains.smallest)}
            for tag, gains in summary.gains.items()
        },
        "gradient_norm": _fields(summary.gradient),
        "tokens_per_second": summary.speed,
        "peak_memory_bytes": summary.memory,
        "memory_of_ngrams": _fields(summary.ngrams),
        "what_was_run": describe_run(summary.run),
        "commands": commands(summary.run),
    }


def _fields(record: object | None) -> dict[str, Any] | None:
    return None if record is None else vars(record)


def _point(point: tuple[int, float] | None) -> dict[str, Any] | None:
    return None if point is None else {"step": point[0], "value": point[1]}


def _extreme(extreme: Extreme | None) -> dict[str, Any] | None:
    if extreme is None:
        return None
    layers = [extreme.first_layer, extreme.last_layer]
    return {
        "value": extreme.value,
        "step": extreme.step,
        "layers": None if extreme.first_layer is None else layers,
    }
