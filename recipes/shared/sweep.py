"""Several runs of `fit`, one after the other or as SLURM jobs.

A sweep can be stopped and started again: runs that have ended are skipped, one that was stopped
goes on from its last checkpoint. How each ended is in its `sweep.json`. A run whose loss stopped
being finite has ended too: that is a result.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import command, show

RECORD = "sweep.json"
FINISHED, DIVERGED = 0, 3  # exit codes of `fit` that end a run


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: Its folder below the sweep's.
        config: The experiment, by name or file.
        overrides: Settings that differ from it.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: What it wrote.
        diverged: Whether its loss stopped being finite.
    """

    folder: Path
    diverged: bool


def run_all(
    runs: Iterable[Run], folder: Path, slurm: dict[str, Any] | None = None
) -> dict[str, Outcome]:
    """Run what has not ended yet.

    Args:
        runs: In their order.
        folder: Where each has a folder of its name.
        slurm: Submit them with these settings of submitit (``partition``, ``timeout_min``, …), all
            at once, and wait for them; None runs them here.

    Returns:
        By name.

    Raises:
        SystemExit: A run failed, other than by its loss; with its exit code.
    """
    runs = list(runs)
    left = [run for run in runs if recorded(run, folder) is None]
    for run in runs:
        if run not in left:
            print(f"{folder / run.name}: has ended before", file=sys.stderr)
    here = (execute(run, folder) for run in left)
    codes = here if slurm is None else _submit(left, folder, dict(slurm))
    for run, code in zip(left, codes, strict=True):
        if code not in (FINISHED, DIVERGED):
            print(f"error: the run in {folder / run.name} failed", file=sys.stderr)
            raise SystemExit(code)
    outcomes = {run.name: recorded(run, folder) for run in runs}
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def execute(run: Run, folder: Path) -> int:
    """Begin a run or go on with it; returns the exit code of `fit`."""
    own = folder / run.name
    words = ["fit", "--config", run.config, f"output_dir={own}", *run.overrides]
    if (own / "checkpoints" / "last").exists():
        words.append("ckpt_path=last")
    elif own.exists():
        words.append("overwrite=true")  # it was stopped before it saved anything
    show(*words)
    began = time.monotonic()
    code = subprocess.run(command(*words), check=False).returncode
    if code in (FINISHED, DIVERGED):
        record = {
            "exit_code": code,
            "config": run.config,
            "overrides": list(run.overrides),
            "seconds": round(time.monotonic() - began, 1),
        }
        (own / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return code


def recorded(run: Run, folder: Path) -> Outcome | None:
    """How a run ended, or None if it has not.

    Raises:
        SystemExit: The folder holds a run with other settings.
    """
    own = folder / run.name
    if not (own / RECORD).is_file():
        return None
    record = json.loads((own / RECORD).read_text(encoding="utf-8"))
    if [record["config"], record["overrides"]] != [run.config, list(run.overrides)]:
        raise SystemExit(
            f"error: {own} holds a run with other settings ({shlex.join(record['overrides'])});"
            " choose another output=FOLDER, or delete it"
        )
    return Outcome(own, record["exit_code"] == DIVERGED)


def _submit(runs: list[Run], folder: Path, settings: dict[str, Any]) -> Iterable[int]:
    try:
        import submitit
    except ImportError:
        raise SystemExit("error: slurm needs submitit: pip install submitit") from None
    executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=settings.pop("cluster", None))
    executor.update_parameters(
        **{key if key in _OF_SUBMITIT else f"slurm_{key}": value for key, value in settings.items()}
    )
    jobs = [executor.submit(execute, run, folder) for run in runs]
    print(f"submitted {len(jobs)} jobs; their output is in {folder / 'slurm'}", file=sys.stderr)
    return (job.result() for job in jobs)


_OF_SUBMITIT = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node")


@dataclass(frozen=True)
class Words:
    """What a recipe was called with.

    Attributes:
        settings: The recipe's own, by name.
        slurm: Those of SLURM, if any was named (``slurm.partition=NAME``).
        overrides: All others, for `fit`.
    """

    settings: dict[str, str]
    slurm: dict[str, Any] | None
    overrides: tuple[str, ...]


def read_words(words: Iterable[str], defaults: dict[str, str]) -> Words:
    """Sort out the words of a recipe's command line.

    Args:
        words: ``key=value``.
        defaults: The recipe's own keys with their values.
    """
    settings, slurm, overrides = dict(defaults), {}, []
    for word in words:
        key, _, value = word.partition("=")
        if key in settings:
            settings[key] = value
        elif key.startswith("slurm."):
            slurm[key.removeprefix("slurm.")] = int(value) if value.isdigit() else value
        else:
            overrides.append(word)
    return Words(settings, slurm or None, tuple(overrides))


def chosen(name: str, value: str, among: Iterable[str]) -> list[str]:
    """The members of a comma-separated list; all of them for an empty one.

    Raises:
        SystemExit: One is unknown.
    """
    known = list(among)
    picked = [part for part in value.split(",") if part] or known
    for part in picked:
        if part not in known:
            raise SystemExit(f"error: {name}={part} is not known; choose from {', '.join(known)}")
    return picked
