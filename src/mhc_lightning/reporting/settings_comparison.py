"""How the settings of runs differ, and whether two runs saw the same batches."""

from collections.abc import Sequence
from typing import Any

from mhc_lightning.reporting.logged_runs import LoggedRun

# Sections that do not change what is trained.
_IRRELEVANT = frozenset(
    {
        *("output_dir", "overwrite", "ckpt_path", "logger", "callbacks", "checkpoint", "machine"),
        *("prompt", "input", "output", "generate", "prepare", "export", "evaluate", "name"),
    }
)
# Of the data's settings, those that decide which sequences a step sees.
_ORDER = ("path", "batch_size", "sequence_length", "seed", "shuffle_window")


def settings(run: LoggedRun) -> dict[str, Any] | None:
    """Dotted keys to values of everything that may change what is trained."""
    if run.config is None:
        return None
    kept = {k: v for k, v in run.config.items() if k not in _IRRELEVANT}
    return dict(_leaves(kept, ""))


def _leaves(node: Any, prefix: str) -> Any:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing_settings(runs: Sequence[LoggedRun]) -> dict[str, list[Any]]:
    """Keys whose values are not the same in all runs that have settings, with each one's value.

    A run without settings, or without this one, has None. The connection counts once, though the
    model's section repeats it.
    """
    known = [settings(run) for run in runs]
    present = [values for values in known if values is not None]
    keys = dict.fromkeys(key for values in present for key in values)
    differing = {}
    for key in keys:
        if key.startswith("model.connection.") and f"connection.{key[17:]}" in keys:
            continue
        if any(values.get(key) != present[0].get(key) for values in present):
            differing[key] = [None if v is None else v.get(key) for v in known]
    return differing


def same_batches(run: LoggedRun, other: LoggedRun) -> bool | None:
    """Whether each step of both saw the same sequences; None where that is not known."""
    if run.setting("data") is None or other.setting("data") is None:
        return None
    contents = run.fact("data.content"), other.fact("data.content")
    keys = _ORDER[1:] if None not in contents else _ORDER
    same = all(run.setting(f"data.{key}") == other.setting(f"data.{key}") for key in keys)
    return same and (contents[0] == contents[1] or None in contents)


def same_but_for_the_seed(run: LoggedRun, other: LoggedRun) -> bool:
    """Whether two runs have all settings in common, seeds left out."""
    mine, theirs = settings(run), settings(other)
    if mine is None or theirs is None:
        return False
    seeds = ("seed", "data.seed")
    return {k: v for k, v in mine.items() if k not in seeds} == {
        k: v for k, v in theirs.items() if k not in seeds
    }
