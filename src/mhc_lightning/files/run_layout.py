"""Names of the files in a run folder; imports no torch, for all readers and writers."""

CONFIG = "config.yaml"
"""Every setting, resolved; `--config` takes this file as an experiment."""

ENVIRONMENT = "environment.json"
"""Versions, devices and command line of the run, and how it ended."""

METRICS = "metrics.csv"
"""One row per logged optimizer step."""

EVENT_FILES = "events.out.tfevents.*"
"""Pattern of TensorBoard's event files."""

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints; `checkpoints.names` has the names in it."""
