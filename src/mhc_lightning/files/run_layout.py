"""The names of what lies in a run folder; without torch, for all who read or write one."""

CONFIG = "config.yaml"
"""Every setting, resolved: an experiment that `--config` takes."""

ENVIRONMENT = "environment.json"
"""Versions, devices, command line and end of the run."""

METRICS = "metrics.csv"
"""One row per logged optimizer step."""

EVENT_FILES = "events.out.tfevents.*"
"""Pattern of TensorBoard's event files."""

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints; `checkpoints.names` has the names in it."""
