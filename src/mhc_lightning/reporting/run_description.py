"""Descriptions of runs, from `config.yaml` and `environment.json`; nothing is guessed."""

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mhc_lightning.reporting.logged_runs import LoggedRun

UNKNOWN = "not recorded"
NO_MEMORY = "Memory"  # the class of a memory without rows

COMPLETE, DIVERGED, INCOMPLETE, UNKNOWN_LENGTH = "complete", "diverged", "incomplete", "unknown"


class Ending(NamedTuple):
    """The end of a run.

    Attributes:
        state: complete, diverged, incomplete, or unknown.
        sentence: The same in a sentence.
    """

    state: str
    sentence: str


def connection_name(run: LoggedRun) -> str | None:
    """The class of the residual connection; None where it is not recorded."""
    target = run.setting("connection._target_") or run.setting("model.connection._target_")
    return str(target).rpartition(".")[2] if target else None


def has_one_stream(run: LoggedRun) -> bool | None:
    """True for an ordinary residual network; None where it is not recorded."""
    if connection_name(run) == "ResidualConnection":
        return True
    streams = run.setting("model.num_streams")
    return None if streams is None else streams == 1


def memory_name(run: LoggedRun) -> str | None:
    """The class of the memory of n-grams, or `none`; None where it is not recorded."""
    if run.setting("model") is None:
        return None
    target = run.setting("memory._target_") or run.setting("model.memory._target_")
    name = str(target or NO_MEMORY).rpartition(".")[2]
    return "none" if name == NO_MEMORY else name


def planned_steps(run: LoggedRun) -> int | None:
    """The run's length as configured, in optimizer steps."""
    steps = run.setting("trainer.max_steps")
    return steps if isinstance(steps, int) and steps > 0 else None


def ending(run: LoggedRun) -> Ending:
    """The end of a run, from its record or else from its last logged or saved step."""
    planned, reached = planned_steps(run), run.last_step
    reason, last = run.fact("ended.reason"), run.fact("ended.step")
    if isinstance(reason, str) and reason != "complete":
        state = DIVERGED if run.fact("ended.non_finite") else INCOMPLETE
        of_planned = f" of {planned:,}" if planned else ""
        return Ending(state, f"Ended after step {last}{of_planned}: {reason}.")
    if planned is not None and max(reached, last or 0) >= planned - _steps_without_trace(run):
        return Ending(COMPLETE, f"Complete: {planned:,} steps.")
    if reason == "complete":
        return Ending(COMPLETE, f"Ended by itself after step {last}.")
    if planned is None:
        return Ending(
            UNKNOWN_LENGTH, f"Logged up to step {reached:,}; its intended length is unknown."
        )
    return Ending(
        INCOMPLETE, f"Incomplete: {reached:,} of {planned:,} steps; still running, or killed."
    )


def _steps_without_trace(run: LoggedRun) -> int:
    """Steps at the end of a complete run that may leave no trace; 0 where ends are recorded."""
    interval = run.setting("trainer.log_every_n_steps")
    if run.fact("arguments") is not None or not isinstance(interval, int):
        return 0
    return max(interval - 1, 0)


def describe_run(run: LoggedRun) -> dict[str, str]:
    """Named facts for people; `UNKNOWN` where something is not recorded."""
    batch, length = run.setting("data.batch_size"), run.setting("data.sequence_length")
    tokens = batch * length if isinstance(batch, int) and isinstance(length, int) else None
    blocks = run.setting("model.num_layers")
    width = f"{_text(run.setting('model.dim'))}, {_text(blocks)}"
    started = run_starts(run)[0].get("started") if run_starts(run) else None
    return {
        "Experiment": _experiment(run) or UNKNOWN,
        "Connection": connection_name(run) or UNKNOWN,
        "Streams": _text(1 if has_one_stream(run) else run.setting("model.num_streams")),
        "Memory of n-grams": memory_name(run) or UNKNOWN,
        "Parameters": _text(run.fact("parameters.total")),
        "Width, blocks": UNKNOWN if blocks is None else width,
        "Data": _data(run),
        "Tokens per step": _text(tokens),
        "Steps": _text(planned_steps(run)),
        "Learning rate": _text(run.setting("optimizer.lr")),
        "Precision": _text(run.setting("trainer.precision")),
        "Seed": _text(run.setting("seed")),
        "Device": _device(run),
        "Versions": _versions(run) or UNKNOWN,
        "Commit": commit(run) or UNKNOWN,
        "Started": format_time(started),
    }


def run_starts(run: LoggedRun) -> list[dict[str, Any]]:
    """The environment of each time the run was started or resumed, the first one first."""
    if run.environment is None:
        return []
    earlier = run.environment.get("earlier") or []
    return [start for start in [*earlier, run.environment] if isinstance(start, dict)]


def commit(run: LoggedRun) -> str | None:
    """The source's commit, shortened, and whether there were uncommitted changes."""
    checksum, _, changes = str(run.fact("commit") or "").partition("+")
    return f"{checksum[:12]}{', with uncommitted changes' if changes else ''}" if checksum else None


def commands(run: LoggedRun) -> list[str]:
    """Commands that repeat the run in a folder of its own; empty where none was recorded.

    They are the recorded commands without `overwrite=` and with another `output_dir`. A command
    that only resumed with the same settings is left out. The first command loses `ckpt_path=last`.
    """
    output_dir = f"{(run.setting('output_dir') or run.folder.name).rstrip('/')}_again"
    chosen: list[list[str]] = []
    for start in run_starts(run):
        words = _arguments(start)
        if words is None:
            continue
        words = [w for w in words if not w.startswith(("overwrite=", "output_dir="))]
        fresh = [w for w in words if w != "ckpt_path=last"]
        if not chosen:
            chosen.append(fresh)
        elif fresh not in chosen:
            chosen.append(words)
    program = ["python", "-m", "mhc_lightning"]
    return [shlex.join([*program, *words, f"output_dir={output_dir}"]) for words in chosen]


def format_time(moment: Any) -> str:
    """An ISO time in UTC as `2026-03-01 12:30 UTC`; other texts as they are."""
    text = str(moment or UNKNOWN)
    return f"{text[:10]} {text[11:16]} UTC" if text.endswith("+00:00") else text


def _arguments(start: dict[str, Any]) -> list[str] | None:
    """The words after the program's name."""
    words = start.get("arguments")
    return [str(word) for word in words] if isinstance(words, list) and words else None


def _experiment(run: LoggedRun) -> str | None:
    words = next((words for start in run_starts(run) if (words := _arguments(start))), [])
    for word, following in pairwise([*words, ""]):
        name, has_value, value = word.partition("=")
        if name == "--config":
            return Path(value if has_value else following).stem
    return None


def _data(run: LoggedRun) -> str:
    path = run.setting("data.path")
    if path is None:
        return UNKNOWN
    text = path if isinstance(path, str) else json.dumps(path, ensure_ascii=False)
    content = run.fact("data.content")
    if not isinstance(content, list):
        return text
    known = f"content {', '.join(str(checksum)[:12] for checksum in content)}"
    kinds = run.fact("data.kind")
    if isinstance(kinds, list) and set(kinds) != {"prepared folder"}:
        known = f"{', '.join(map(str, kinds))}; {known}"
    return f"{text} ({known})"


def _device(run: LoggedRun) -> str:
    device = run.fact("device")
    if not device:
        return UNKNOWN
    on_cpu = run.setting("trainer.accelerator") == "cpu"
    text = str((on_cpu and run.fact("processor")) or device)
    threads, processes = run.fact("threads"), run.fact("processes")
    if (on_cpu or not run.fact("devices")) and threads:
        text += f", {threads} thread{'s' if threads > 1 else ''}"
    return f"{processes} × {text}" if isinstance(processes, int) and processes > 1 else text


def _versions(run: LoggedRun) -> str:
    versions = run.fact("versions") or {}
    names = ("mhc-lightning", "torch", "lightning", "python")
    return ", ".join(f"{name} {versions[name]}" for name in names if name in versions)


def _text(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
