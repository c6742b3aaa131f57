"""What was run: read off the settings and the environment, never guessed."""

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

from mhc_lightning.reporting.logged_runs import LoggedRun

UNKNOWN = "not recorded"


def connection(run: LoggedRun) -> str | None:
    """The class of the residual connection."""
    target = run.setting("connection._target_") or run.setting("model.connection._target_")
    return str(target).rpartition(".")[2] if target else None


def has_one_stream(run: LoggedRun) -> bool | None:
    """Whether it is the ordinary residual network; None where that is not known."""
    kind = connection(run)
    if kind == "ResidualConnection":
        return True
    streams = run.setting("model.num_streams")
    return None if streams is None else streams == 1


def planned_steps(run: LoggedRun) -> int | None:
    """The length that was asked for, in optimizer steps."""
    steps = run.setting("trainer.max_steps")
    return steps if isinstance(steps, int) and steps > 0 else None


def ending(run: LoggedRun) -> tuple[str, str]:
    """How a run ended: a word (complete, diverged, incomplete, unknown) and a sentence."""
    planned, reached = planned_steps(run), run.last_step
    reason, last = run.fact("ended.reason"), run.fact("ended.step")
    if isinstance(reason, str) and reason != "complete":
        word = "diverged" if run.fact("ended.non_finite") else "incomplete"
        of = f" of {planned:,}" if planned else ""
        return word, f"Ended after step {last}{of}: {reason}."
    if planned is not None and max(reached, last or 0) >= planned - _unlogged(run):
        return "complete", f"Complete: {planned:,} steps."
    if reason == "complete":
        return "complete", f"Ended by itself after step {last}."
    if planned is None:
        return "unknown", f"Logged up to step {reached:,}; how long it was meant to be is unknown."
    return (
        "incomplete",
        f"Incomplete: {reached:,} of {planned:,} steps; still running, or killed.",
    )


def _unlogged(run: LoggedRun) -> int:
    """Steps at the end of a complete run that may leave no trace: none where ends are recorded."""
    interval = run.setting("trainer.log_every_n_steps")
    if run.fact("arguments") is not None or not isinstance(interval, int):
        return 0
    return max(interval - 1, 0)


def what_was_run(run: LoggedRun) -> dict[str, str]:
    """Named facts for people; what is not recorded says so."""
    tokens = _product(run.setting("data.batch_size"), run.setting("data.sequence_length"))
    layers = run.setting("model.num_layers")
    streams = 1 if has_one_stream(run) else run.setting("model.num_streams")
    versions = run.fact("versions") or {}
    return {
        "Experiment": _experiment(run) or UNKNOWN,
        "Connection": connection(run) or UNKNOWN,
        "Streams": _shown(streams),
        "Parameters": _shown(run.fact("parameters.total")),
        "Width, blocks": f"{_shown(run.setting('model.dim'))}, {_shown(layers)}"
        if layers is not None
        else UNKNOWN,
        "Data": _data(run),
        "Tokens per step": _shown(tokens),
        "Steps": _shown(planned_steps(run)),
        "Learning rate": _shown(run.setting("optimizer.lr")),
        "Precision": _shown(run.setting("trainer.precision")),
        "Seed": _shown(run.setting("seed")),
        "Device": _device(run),
        "Versions": ", ".join(
            f"{name} {versions[name]}"
            for name in ("mhc-lightning", "torch", "lightning", "python")
            if name in versions
        )
        or UNKNOWN,
        "Commit": commit(run) or UNKNOWN,
        "Started": when(_first(run, "started")),
    }


def starts(run: LoggedRun) -> list[dict[str, Any]]:
    """The environments of every time the run was started or went on, the first one first."""
    if run.environment is None:
        return []
    earlier = run.environment.get("earlier") or []
    return [start for start in [*earlier, run.environment] if isinstance(start, dict)]


def commit(run: LoggedRun) -> str | None:
    """The source's commit, shortened, and whether there were changes beside it."""
    checksum, _, changes = str(run.fact("commit") or "").partition("+")
    return f"{checksum[:12]}{', with uncommitted changes' if changes else ''}" if checksum else None


def _first(run: LoggedRun, key: str) -> Any:
    return starts(run)[0].get(key) if starts(run) else None


def commands(run: LoggedRun) -> list[str]:
    """Commands that do the run again, in a folder of its own; empty where none was recorded.

    They are what was typed, less what overwrites, with another ``output_dir``. A command that only
    went on, with the same settings, is left out, and so is ``ckpt_path=last`` of a first one.
    """
    again = f"{(run.setting('output_dir') or run.folder.name).rstrip('/')}_again"
    found: list[list[str]] = []
    for start in starts(run):
        words = _words(start)
        if words is None:
            continue
        kept = [w for w in words if not w.startswith(("overwrite=", "output_dir="))]
        plain = [w for w in kept if w != "ckpt_path=last"]
        if not found:
            found.append(plain)
        elif plain not in found:
            found.append(kept)
    program = ["python", "-m", "mhc_lightning"]
    return [shlex.join([*program, *words, f"output_dir={again}"]) for words in found]


def _words(start: dict[str, Any]) -> list[str] | None:
    """What followed the program's name."""
    words = start.get("arguments")
    return [str(word) for word in words] if isinstance(words, list) and words else None


def _experiment(run: LoggedRun) -> str | None:
    words = next((words for start in starts(run) if (words := _words(start))), [])
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
    return f"{text} (content {', '.join(str(checksum)[:12] for checksum in content)})"


def _device(run: LoggedRun) -> str:
    device = run.fact("device")
    if not device:
        return UNKNOWN
    processes = run.fact("processes")
    on_cpu = run.setting("trainer.accelerator") == "cpu"
    text = str((on_cpu and run.fact("processor")) or device)
    threads = run.fact("threads")
    if (on_cpu or not run.fact("devices")) and threads:
        text += f", {threads} thread{'s' if threads > 1 else ''}"
    return f"{processes} × {text}" if isinstance(processes, int) and processes > 1 else text


def when(moment: Any) -> str:
    """An ISO time in UTC as 2026-03-01 12:30 UTC."""
    text = str(moment or UNKNOWN)
    return f"{text[:10]} {text[11:16]} UTC" if text.endswith("+00:00") else text


def _product(*numbers: Any) -> int | None:
    result = 1
    for number in numbers:
        if not isinstance(number, int):
            return None
        result *= number
    return result


def _shown(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
