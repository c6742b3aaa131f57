"""A pipeline under every schedule, beside the same network with the ordinary connection."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Transformer
from mhc_lightning.planning.activations import MicroBatch
from mhc_lightning.planning.data_parallel import DataParallel
from mhc_lightning.planning.machine import Machine
from mhc_lightning.planning.pipeline import Pipeline, PipelineForecast, forecast
from mhc_lightning.planning.stages import SCHEDULES


@dataclass(frozen=True)
class Comparison:
    """The prediction under one of several schedules.

    Attributes:
        forecast: The run under this schedule; None if the layout does not fit it.
        refusal: The reason why it does not fit.
        baseline: The prediction with the ordinary residual connection, if there is one.
    """

    forecast: PipelineForecast | None
    refusal: str = ""
    baseline: PipelineForecast | None = None

    def overhead(self, *, overlapped: bool) -> float | None:
        """The added time of a step, as a share of the baseline's step."""
        if self.forecast is None or self.baseline is None:
            return None
        ours, theirs = (
            each.seconds(overlapped=overlapped) for each in (self.forecast, self.baseline)
        )
        return ours / theirs - 1

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        if self.forecast is None:
            return {"refusal": self.refusal}
        record = self.forecast.summary()
        for mode, overlapped in (("sequential", False), ("overlapped", True)):
            record[mode]["overhead_over_residual"] = self.overhead(overlapped=overlapped)
        return record


def compare_schedules(
    model: Transformer,
    baseline: Transformer | None,
    pipeline: Pipeline,
    batch: MicroBatch,
    replicas: DataParallel,
    state_per_value: Callable[[nn.Module, nn.Parameter], int],
    machine: Machine,
    passes: int,
) -> dict[str, Comparison]:
    """Predict the run under every schedule; the arguments are those of `forecast`.

    Args:
        model: The whole model.
        baseline: The model with the ordinary residual connection; None for no comparison.
        pipeline: The layout of one pipeline.
        batch: A micro-batch.
        replicas: The pipelines that share each stage's state.
        state_per_value: Numbers that the optimizer keeps for each value of a parameter of a model.
        machine: The devices.
        passes: Passes through the pipeline per optimizer step.
    """
    rest = batch, replicas, state_per_value, machine, passes
    found = {}
    for schedule in SCHEDULES:
        try:
            other = pipeline.under(schedule, model, batch.sequences * pipeline.micro_batches)
            ours = forecast(model, other, *rest)
        except UserError as error:
            found[schedule] = Comparison(None, str(error))
            continue
        plain = None
        if baseline is not None and pipeline.measured is None:
            plain = forecast(baseline, other, *rest)
        found[schedule] = Comparison(ours, baseline=plain)
    return found
