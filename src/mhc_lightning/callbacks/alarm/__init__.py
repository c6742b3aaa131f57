"""The stability alarm: bands, policy, evidence, and control over optimizer updates."""

from mhc_lightning.callbacks.alarm.stability_alarm import StabilityAlarm

__all__ = ["StabilityAlarm"]
