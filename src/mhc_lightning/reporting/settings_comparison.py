"""Comparison of runs by their settings: differences, equal batches, equality but for the seed."""

from collections.abc import Iterator, Sequence
from typing import Any

from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.run_description import memory_name

# Sections of the configuration that do not change what is trained.
_IRRELEVANT = frozenset(
    {
        *("output_dir", "overwrite", "ckpt_path", "logger", "callbacks", "checkpoint", "machine"),
        *("prompt", "input", "output", "generate", "prepare", "export", "evaluate", "name"),
    }
)
_PARTIAL = "_partial_"  # how an object is made, and not what it is
_SEEDS = ("seed", "data.seed")
# The data's settings that decide, beside the data themselves, which sequences a step sees.
_BATCHING = ("batch_size", "sequence_length", "seed", "shuffle_window")


def training_settings(run: LoggedRun) -> dict[str, Any] | None:
    """All settings that may change what is trained, by dotted key; None without `config.yaml`."""
    if run.config is None:
        return None
    settings = dict(_leaves({k: v for k, v in run.config.items() if k not in _IRRELEVANT}, ""))
    if memory_name(run) == "none":  # runs of before there were memories do not name it
        return {k: v for k, v in settings.items() if "memory" not in k.split(".")[:-1]}
    return settings


def _leaves(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif key != _PARTIAL:
            yield f"{prefix}{key}", value


def differing_settings(runs: Sequence[LoggedRun]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs that have a configuration.

    Returns:
        By dotted key one value per run; None for a run without a configuration or without this
        key. The connection and the memory, which the model's section repeats, are listed once.
    """
    settings = [training_settings(run) for run in runs]
    present = [values for values in settings if values is not None]
    keys = dict.fromkeys(key for values in present for key in values)
    differing = {}
    for key in keys:
        repeated = key.startswith(("model.connection.", "model.memory."))
        if repeated and key.removeprefix("model.") in keys:
            continue
        if any(values.get(key) != present[0].get(key) for values in present):
            differing[key] = [None if values is None else values.get(key) for values in settings]
    return differing


def same_batches(run: LoggedRun, other: LoggedRun) -> bool | None:
    """True if both runs saw the same sequences at each step; None where that is not recorded."""
    if run.setting("data") is None or other.setting("data") is None:
        return None
    if any(run.setting(f"data.{key}") != other.setting(f"data.{key}") for key in _BATCHING):
        return False
    contents = run.fact("data.content"), other.fact("data.content")
    if None in contents:  # no checksums: compare the paths
        return run.setting("data.path") == other.setting("data.path")
    return contents[0] == contents[1]


def same_but_for_the_seed(run: LoggedRun, other: LoggedRun) -> bool:
    """True if two runs have a configuration each and differ in nothing but seeds."""
    settings = [training_settings(each) for each in (run, other)]
    if None in settings:
        return False
    mine, theirs = (
        {key: value for key, value in (each or {}).items() if key not in _SEEDS}
        for each in settings
    )
    return mine == theirs
