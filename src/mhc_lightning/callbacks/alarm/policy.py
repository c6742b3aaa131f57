"""The policy of an alarm: which values lead to which actions, without a trainer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mhc_lightning.callbacks.alarm.robust_band import Breach, RobustBand
from mhc_lightning.errors import UserError

ACTIONS = ("warn", "checkpoint", "skip_update", "lower_lr")


class Decision(NamedTuple):
    """The actions to take in a step.

    Attributes:
        breaches: The values to report.
        skip: True leaves out the update.
        checkpoint: True saves the state.
        lower: True lowers the learning rate.
    """

    breaches: list[Breach]
    skip: bool = False
    checkpoint: bool = False
    lower: bool = False


class AlarmPolicy:
    """Decides from the values of each step; equal values give equal decisions in every process.

    Args:
        actions: The actions that may be taken, of `ACTIONS`.
        bands: The bands of the metrics.
        patience: Values in a row out of a band before any action but a skip is taken.
        cooldown: Steps after a report without another report of the same metric, and after a
            checkpoint or lowering without another checkpoint or lowering.
        max_skips: The largest number of updates skipped in a row.

    Raises:
        UserError: A setting is out of range.
    """

    def __init__(
        self,
        actions: Sequence[str],
        bands: Sequence[RobustBand],
        patience: int,
        cooldown: int,
        max_skips: int,
    ) -> None:
        unknown = [action for action in actions if action not in ACTIONS]
        if unknown or not actions:
            given = repr(unknown[0]) if unknown else "nothing"
            raise UserError(
                f"StabilityAlarm: actions holds {given}; choose from {', '.join(ACTIONS)}"
            )
        for name, value, least in (
            ("patience", patience, 1),
            ("cooldown", cooldown, 0),
            ("max_skips", max_skips, 1),
        ):
            if value < least:
                raise UserError(f"StabilityAlarm: {name} is {value}; give at least {least}")
        self.actions = tuple(actions)
        self.bands = {band.tag: band for band in bands}
        self.patience = patience
        self.cooldown = cooldown
        self.max_skips = max_skips
        self.reset()

    def reset(self) -> None:
        """Forget every value."""
        for band in self.bands.values():
            band.values.clear()
        self._in_row = dict.fromkeys(self.bands, 0)  # values in a row out of the band
        self._quiet_until = dict.fromkeys(self.bands, 0)  # first step of the next report
        self._at_rest_until = 0  # first step of the next checkpoint or lowering
        self._breached_steps = 0  # steps in a row

    def decide(
        self, step: int, values: Mapping[str, float], *, before_update: bool
    ) -> Decision | None:
        """Judge the values of a step, add them to their bands, and decide; None takes no action.

        Args:
            step: The optimizer step, first 1.
            values: By tag; each the tag of a band.
            before_update: True while the step's update can still be skipped.
        """
        breaches = []
        for tag, value in values.items():
            breach = self.bands[tag].judge(value)
            self._in_row[tag] = 0 if breach is None else self._in_row[tag] + 1
            if breach is not None:
                breaches.append(breach)
        skip = False
        if before_update:
            may_skip = self._breached_steps < self.max_skips
            self._breached_steps = self._breached_steps + 1 if breaches else 0
            skip = "skip_update" in self.actions and bool(breaches) and may_skip
        lasting = [
            breach
            for breach in breaches
            if self._in_row[breach.tag] >= self.patience and step >= self._quiet_until[breach.tag]
        ]
        act = bool(lasting) and step >= self._at_rest_until
        checkpoint, lower = (act and name in self.actions for name in ("checkpoint", "lower_lr"))
        if checkpoint or lower:
            self._at_rest_until = step + self.cooldown
        for breach in lasting:
            self._quiet_until[breach.tag] = step + self.cooldown
        if skip or checkpoint or lower or (lasting and "warn" in self.actions):
            return Decision(breaches if skip else lasting, skip, checkpoint, lower)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on."""
        return {
            "bands": {tag: list(band.values) for tag, band in self.bands.items()},
            "in_row": dict(self._in_row),
            "quiet_until": dict(self._quiet_until),
            "at_rest_until": self._at_rest_until,
            "breached_steps": self._breached_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; metrics that it lacks begin anew."""
        self.reset()
        for tag in self.bands.keys() & state["bands"].keys():
            self.bands[tag].values.extend(state["bands"][tag])
            self._in_row[tag] = state["in_row"][tag]
            self._quiet_until[tag] = state["quiet_until"][tag]
        self._at_rest_until = state["at_rest_until"]
        self._breached_steps = state["breached_steps"]
