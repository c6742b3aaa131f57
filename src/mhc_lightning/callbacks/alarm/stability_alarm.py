"""The stability alarm: warns, saves, skips the update or lowers the learning rate."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from tqdm import tqdm

from mhc_lightning.callbacks.alarm.evidence import (
    first_process_values,
    largest_gradient,
    spans,
    sub_layers_above,
)
from mhc_lightning.callbacks.alarm.policy import AlarmPolicy, Decision
from mhc_lightning.callbacks.alarm.robust_band import RobustBand
from mhc_lightning.callbacks.alarm.update_control import LoweredRate, UpdateGuard
from mhc_lightning.callbacks.stream_sampler import StreamSampler
from mhc_lightning.errors import NonFiniteLossError, UserError
from mhc_lightning.loggers.trainer_loggers import log_scalars
from mhc_lightning.optimizers.finiteness import require_finite

_MIN_GAIN_SAMPLES = 8  # gains are sampled on logging steps only


class StabilityAlarm(pl.Callback):
    """Watches loss, gradient norm and composite gains, and acts when one of them shoots up.

    Each metric is judged by its own last `window` values (see `RobustBand`): a value is out of its
    band if it is not finite, above its limit, or above
    median + max(`deviations` · σ, rise · |median|). Loss and gradient norm are judged in every
    optimizer step, between clipping and the update, after a quarter of a window; gains when they
    are sampled, after eight samples.

    The actions:

    - `warn`: report the value. Standard error gets one line with the value, the band, the
      sub-layers (of a gain) or the largest gradient, and the actions taken. Loggers get
      `alarm/<tag>`, `alarm/<tag>/bound`, `alarm/skipped_updates` (so far) and `alarm/lr_scale`.
      Every other action is reported in the same way.
    - `checkpoint`: save the state at the end of this step. `RunCheckpoint` keeps it and the one
      before it for good; without that callback, `alarm_step_<n>.ckpt` is written. Neither saves a
      state that is not finite: the run ends with `NonFiniteLossError`.
    - `skip_update`: leave out the update of this step, if loss or gradient norm is out of its
      band. Weights and the optimizer's moments stay as they are. The step counts nevertheless: the
      schedule goes on, and its batch is not seen again. After `max_skips` skips in a row updates
      are made again, since a lasting breach does not come from a bad batch (if the values are not
      finite, the module's own check ends the run). A gain is no reason to skip: it comes from the
      weights, which a skip keeps.
    - `lower_lr`: multiply the learning rate by `lr_factor` from the next update on, on top of the
      schedule (at most down to a tenth); it rises back linearly within `lr_recovery_steps`.

    Loss and gradient norm are metrics that the module logs before the update: in its
    `training_step`, `on_before_optimizer_step` or `configure_gradient_clipping`. Gains are
    tags in the samples of `AmaxGain` or another `StreamSampler`. The first process's values are
    judged, so that every process takes the same actions. They are read from the device in every
    step, where `LanguageModel` has just waited for them.

    Windows, pauses and the lowered learning rate are in the checkpoint. A module with manual
    optimization is watched after its steps, and can only have `warn` and `checkpoint`.

    Args:
        actions: The actions to take, of `warn`, `checkpoint`, `skip_update` and `lower_lr`.
        loss: Tag of the loss; None does not watch it.
        grad_norm: Tag of the gradient norm; None does not watch it.
        gains: Tags of gains.
        window: The number of values from which a band is computed.
        deviations: Robust standard deviations above the median that are ordinary.
        loss_rise: The share of its median by which a loss may always exceed the median.
        grad_norm_rise: The same for the gradient norm. It is large because the norms of small
            batches have heavy tails: 6 medians in healthy runs on a few hundred tokens per step.
        gain_rise: The same for gains.
        loss_limit: A bound that holds from the first step on; None sets none.
        grad_norm_limit: The same for the gradient norm.
        gain_limit: The same for gains.
        patience: Values in a row out of the band before any action but a skip is taken.
        cooldown: Optimizer steps after a report without another report of the same metric, and
            after a checkpoint or lowering without another checkpoint or lowering.
        max_skips: Updates that may be skipped in a row.
        lr_factor: The factor on the learning rate.
        lr_recovery_steps: Optimizer steps within which the rate rises back; None keeps it lowered.

    Attributes:
        interventions: Steps of reports, with their texts, in this process.
        skipped_updates: The number of updates that the run has skipped.

    Raises:
        UserError: A setting is out of range or, as a fit starts, does not suit the module.
    """

    def __init__(
        self,
        actions: Sequence[str] = ("warn",),
        *,
        loss: str | None = "train/loss",
        grad_norm: str | None = "train/grad_norm",
        gains: Sequence[str] = ("amax_gain/composite/forward", "amax_gain/composite/backward"),
        window: int = 128,
        deviations: float = 8.0,
        loss_rise: float = 0.1,
        grad_norm_rise: float = 9.0,
        gain_rise: float = 0.5,
        loss_limit: float | None = None,
        grad_norm_limit: float | None = None,
        gain_limit: float | None = None,
        patience: int = 1,
        cooldown: int = 100,
        max_skips: int = 5,
        lr_factor: float = 0.5,
        lr_recovery_steps: int | None = 1000,
    ) -> None:
        self._step_tags = [tag for tag in (loss, grad_norm) if tag is not None]
        self._gain_tags = list(gains)
        quarter = window // 4
        samples = min(quarter, _MIN_GAIN_SAMPLES)

        def band(tag: str, least: int, rise: float, limit: float | None) -> RobustBand:
            return RobustBand(tag, window, least, deviations, rise, limit)

        bands = [band(tag, samples, gain_rise, gain_limit) for tag in self._gain_tags]
        if loss is not None:
            bands.append(band(loss, quarter, loss_rise, loss_limit))
        if grad_norm is not None:
            bands.append(band(grad_norm, quarter, grad_norm_rise, grad_norm_limit))
        self._policy = AlarmPolicy(actions, bands, patience, cooldown, max_skips)
        self._rate = LoweredRate(lr_factor, lr_recovery_steps)
        self._guard = UpdateGuard(self._before_update, self._scale_of_update)
        self._begin()

    def _begin(self) -> None:
        self._policy.reset()
        self._rate.reset()
        self.skipped_updates = 0
        self.interventions: list[tuple[int, str]] = []
        self._judged_samples: dict[str, float] = {}  # by tag, the step of the last sample judged
        self._judged_step = 0
        self._missing: set[str] = set()
        self._save_is_due = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew; the state in a checkpoint is loaded after this."""
        if stage == "fit":
            self._begin()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the guard between the module's gradients and the update."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._trainer = trainer
        if pl_module.automatic_optimization:
            self._guard.install(pl_module)
        elif {"skip_update", "lower_lr"} & set(self._policy.actions):
            raise UserError(
                f"StabilityAlarm: {type(pl_module).__name__} optimizes by hand, so that its updates"
                " cannot be changed; choose from warn, checkpoint"
            )
        if self._gain_tags and not any(isinstance(c, StreamSampler) for c in callbacks):
            rank_zero_warn("StabilityAlarm watches no gains: the trainer has no AmaxGain")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ignore samples and steps from before this fit."""
        self._judged_samples = {tag: sample["step"] for tag, sample in self._samples().items()}
        self._judged_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Judge the gains sampled in this step, and save if the policy decided on a checkpoint."""
        step = trainer.global_step
        if not pl_module.automatic_optimization and step > self._judged_step:
            self._judged_step = step
            values, _ = first_process_values(trainer, self._logged())
            self._judge(step, values, before_update=False)
        samples = {
            tag: sample
            for tag, sample in self._samples().items()
            if sample["step"] != self._judged_samples.get(tag)
        }
        if samples:
            self._judged_samples |= {tag: sample["step"] for tag, sample in samples.items()}
            values, _ = first_process_values(
                trainer, {tag: sample[tag] for tag, sample in samples.items()}
            )
            self._judge(step, values, before_update=False, samples=samples)
        if self._save_is_due:
            self._save_is_due = False
            _save_step(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Restore the module's methods."""
        self._guard.remove()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module's methods."""
        self._guard.remove()

    def state_dict(self) -> dict[str, Any]:
        """Windows, pauses, counts and the lowered learning rate."""
        return {
            "policy": self._policy.state_dict(),
            "rate": self._rate.state_dict(),
            "skipped_updates": self.skipped_updates,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._policy.load_state_dict(state_dict["policy"])
        self._rate.load_state_dict(state_dict["rate"])
        self.skipped_updates = state_dict["skipped_updates"]

    def _scale_of_update(self) -> float:
        return self._rate.scale(self._trainer.global_step + 1)

    def _before_update(self, failure: NonFiniteLossError | None) -> bool:
        """True skips the update; `failure` is the error that this process's module raised."""
        values, failed = first_process_values(self._trainer, self._logged(), failure is not None)
        if failed and self._step_tags and all(map(math.isfinite, values.values())):
            values[self._step_tags[0]] = math.nan  # another process's value is not finite
        return self._judge(self._trainer.global_step + 1, values, before_update=True)

    def _judge(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        before_update: bool,
        samples: Mapping[str, Mapping[str, float]] | None = None,
    ) -> bool:
        """Take the actions that the policy decides on; True if the update is to be skipped."""
        decision = self._policy.decide(step, values, before_update=before_update)
        if decision is None:
            return False
        actions = []
        if decision.skip:
            self.skipped_updates += 1
            actions.append("update skipped")
        if decision.lower:
            self._rate.lower(step)
            actions.append(str(self._rate))
        if decision.checkpoint:
            self._save_is_due = True
            actions.append("checkpoint at the end of the step")
        evidence = []
        for breach in decision.breaches:
            sample = (samples or {}).get(breach.tag, {})
            layers = sub_layers_above(sample, breach.tag, breach.bound)
            evidence.append(f"{breach}, sub-layers {spans(layers)}" if layers else str(breach))
        gradient = largest_gradient(self._trainer) if before_update else None
        evidence += [gradient] if gradient else []
        text = f"{'; '.join(evidence)}: {', '.join(actions) or 'nothing done'}"
        self._report(step, decision, text)
        return decision.skip

    def _report(self, step: int, decision: Decision, text: str) -> None:
        self.interventions.append((step, text))
        if self._trainer.is_global_zero:
            tqdm.write(f"alarm: step {step}: {text}", file=sys.stderr)
        scalars = {"alarm/skipped_updates": float(self.skipped_updates)}
        scalars["alarm/lr_scale"] = self._rate.scale(step + 1)
        for breach in decision.breaches:
            scalars[f"alarm/{breach.tag}"] = breach.value
            if breach.bound is not None:
                scalars[f"alarm/{breach.tag}/bound"] = breach.bound
        log_scalars(self._trainer, self._trainer.lightning_module, scalars, step)

    def _logged(self) -> dict[str, Any]:
        """The watched metrics that the module has logged in this step."""
        metrics = self._trainer.callback_metrics
        for tag in self._step_tags:
            if tag not in metrics and tag not in self._missing:
                self._missing.add(tag)
                rank_zero_warn(
                    f"StabilityAlarm cannot watch {tag}: it was not logged by the first update"
                    f" (there were: {', '.join(sorted(metrics)) or 'none'})"
                )
        return {tag: metrics[tag] for tag in self._step_tags if tag in metrics}

    def _samples(self) -> dict[str, Mapping[str, float]]:
        """The last sample that holds each gain."""
        return {
            tag: callback.last
            for callback in self._trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, StreamSampler)
            for tag in self._gain_tags
            if tag in callback.last
        }


def _save_step(trainer: pl.Trainer) -> None:
    """Save at the end of this step, by the run's own callback if it has `save_at_step_end`."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "save_at_step_end"):
            callback.save_at_step_end()
            return
    require_finite(trainer)
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    trainer.save_checkpoint(Path(folder) / f"alarm_step_{trainer.global_step:08d}.ckpt")
