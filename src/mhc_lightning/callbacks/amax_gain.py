"""Logs the Amax gain of a model's residual mappings while it trains."""

import math
from typing import NamedTuple

import lightning.pytorch as pl
from torch import Tensor

from mhc_lightning.callbacks.every_n_steps import EveryNSteps
from mhc_lightning.callbacks.gains import GAIN_TAGS, amax_gains
from mhc_lightning.callbacks.stream_sampler import StreamSampler
from mhc_lightning.callbacks.watching.observations import Observation, predecessors
from mhc_lightning.callbacks.watching.stream_watcher import Extract
from mhc_lightning.loggers.trainer_loggers import log_image, log_scalars, takes_images
from mhc_lightning.plotting.gain_profile import gain_profile


class Peak(NamedTuple):
    """The largest value of a gain so far, its sub-layer (from 0) and its step."""

    value: float
    layer: int
    step: int


class _Gains(NamedTuple):
    layers: list[int]
    values: Tensor  # [4, L], in the order of GAIN_TAGS


class AmaxGain(StreamSampler[_Gains]):
    """Logs how much the residual mappings amplify signals forward and gradients backward.

    The forward gain of a matrix is its largest |row sum|, the backward gain its largest |column
    sum|. Single-layer gains take H_l; composite gains take H_l ··· H_1 forward and H_L ··· H_l
    backward (arXiv 2512.24880; 1 is ideal). Gains are taken per token and averaged over all tokens
    of the sampled micro-batch. Composites are taken along the streams: each forward pass of a step,
    of one network or of several, is a chain of its own (see `StreamSampler`).

    Tags: `amax_gain/{single,composite}/{forward,backward}`, each the largest over sub-layers (of
    all chains); `…/layer_<k>` beside each, for every sub-layer (k from 0 in the order of the calls,
    through all chains; the largest, if a sub-layer's streams go to several); and the image
    `amax_gain/profile`. The four largest are in `trainer.callback_metrics` too.

    The callback works in any LightningModule. It watches every module whose output is a
    `StreamMappings`, and foreign modules from which `extract` makes one. Where sub-layers differ in
    the number of streams or of tokens, composites are taken within each stretch of equal shape.

    Args:
        every_n_steps: Optimizer steps between samples; None takes the trainer's
            `log_every_n_steps`.
        extract: `(module, args, output) -> StreamMappings | None` for foreign modules.
        token_mean: True takes the gain of the token-averaged matrix instead (composites: of the
            token-averaged product). It is never larger; the paper leaves open which it plots.
        profile_every_n_steps: Optimizer steps between pictures of the gain by sub-layer, drawn
            where a sample is taken; None takes 50 times the trainer's `log_every_n_steps`, and
            the first sample. The last step of a run (`max_steps`) is drawn if it is a sample.

    Attributes:
        last: The last sample by tag, and `step`.
        peaks: The largest of each of the four gains in this run, by tag, as `Peak`.

    Raises:
        UserError: An interval is not a positive integer.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        extract: Extract | None = None,
        *,
        token_mean: bool = False,
        profile_every_n_steps: int | None = None,
    ) -> None:
        super().__init__(every_n_steps, extract)
        self.token_mean = token_mean
        self.peaks: dict[str, Peak] = {}
        self._profiles = EveryNSteps(
            profile_every_n_steps, "AmaxGain (profile)", log_intervals=50, ends=True
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from where the run starts, or resumes."""
        super().on_train_start(trainer, pl_module)
        self._profiles.restart(trainer.global_step)
        self.peaks = {}

    def reduce(self, observations: list[Observation]) -> _Gains:
        """The gains, still on the device."""
        residuals = [observation.mappings.residual for observation in observations]
        values = amax_gains(residuals, predecessors(observations), token_mean=self.token_mean)
        return _Gains([observation.layer for observation in observations], values)

    def report(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, reduced: _Gains
    ) -> dict[str, float]:
        """Log the gains of one sample."""
        gains = dict(zip(GAIN_TAGS, reduced.values.tolist(), strict=True))  # the one transfer
        values: dict[str, float] = {}
        for tag, by_layer in gains.items():
            largest = 0
            for k, value in enumerate(by_layer):
                largest = k if _exceeds(value, by_layer[largest]) else largest
            values[tag] = by_layer[largest]
            layer = reduced.layers[largest]
            for k, value in zip(reduced.layers, by_layer, strict=True):
                values[f"{tag}/layer_{k}"] = value
            peak = self.peaks.get(tag)
            if peak is None or _exceeds(values[tag], peak.value):
                self.peaks[tag] = Peak(values[tag], layer, step)
        log_scalars(trainer, pl_module, values, step, monitored=GAIN_TAGS)
        if self._profiles.is_due(trainer, step) and takes_images(trainer):
            log_image(trainer, "amax_gain/profile", gain_profile(gains, step), step)
        return values


def _exceeds(value: float, other: float) -> bool:
    """True if a gain is larger than another; NaN is larger than every number."""
    return not math.isnan(other) and (math.isnan(value) or value > other)
