"""Several runs of `fit`: one after the other, some at a time, or as SLURM jobs.

A sweep can be stopped and started again: runs that have ended are skipped, one that was stopped
goes on from its last checkpoint. How each ended is in its `sweep.json`. A run whose loss stopped
being finite has ended too: that is a result.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
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
    runs: Iterable[Run], folder: Path, slurm: dict[str, Any] | None = None, jobs: int = 1
) -> dict[str, Outcome]:
    """Run what has not ended yet.

    Args:
        runs: In their order.
        folder: Where each has a folder of its name.
        slurm: Submit them with these settings of submitit (``partition``, ``timeout_min``, …), all
            at once, and wait for them; None runs them here.
        jobs: How many run here at a time. If several, each has its share of the processor's cores,
            and a GPU of its own as far as there are any; what it prints goes to a file.

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
    if slurm is not None:
        codes = _submit(left, folder, dict(slurm))
    elif jobs > 1:
        codes = _side_by_side(left, folder, jobs)
    else:
        codes = (execute(run, folder) for run in left)
    for run, code in zip(left, codes, strict=True):
        if code not in (FINISHED, DIVERGED):
            print(f"error: the run in {folder / run.name} failed", file=sys.stderr)
            raise SystemExit(code)
    outcomes = {run.name: recorded(run, folder) for run in runs}
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def execute(run: Run, folder: Path, own_device: dict[str, str] | None = None) -> int:
    """Begin a run or go on with it; returns the exit code of `fit`.

    Args:
        run: What to run.
        folder: The sweep's.
        own_device: Environment variables for one of several at a time: its output goes to
            ``output/NAME.txt``. None shows it.
    """
    own = folder / run.name
    words = ["fit", "--config", run.config, f"output_dir={own}", *run.overrides]
    if (own / "checkpoints" / "last").exists():
        words.append("ckpt_path=last")
    elif own.exists():
        words.append("overwrite=true")  # it was stopped before it saved anything
    show(*words)
    began = time.monotonic()
    if own_device is None:
        code = subprocess.run(command(*words), check=False).returncode
    else:
        text = folder / "output" / f"{run.name}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        with text.open("a", encoding="utf-8") as file:
            code = subprocess.run(
                command(*words),
                env={**os.environ, **own_device},
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        ended = {FINISHED: "ended", DIVERGED: "diverged"}.get(code, f"failed (see {text})")
        print(f"{own}: {ended} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
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


def _side_by_side(runs: list[Run], folder: Path, jobs: int) -> list[int]:
    """Run some at a time; after a failure none is begun any more. Returns their exit codes."""
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    gpus = torch.cuda.device_count()
    devices: SimpleQueue[dict[str, str]] = SimpleQueue()
    for job in range(jobs):
        gpu = {"CUDA_VISIBLE_DEVICES": str(job % gpus)} if gpus > 1 else {}
        devices.put({"OMP_NUM_THREADS": threads, **gpu})
    failed = False

    def one(run: Run) -> int:
        nonlocal failed
        if failed:
            return 0
        device = devices.get()
        code = execute(run, folder, device)
        devices.put(device)
        failed = failed or code not in (FINISHED, DIVERGED)
        return code

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, runs))


def _submit(runs: list[Run], folder: Path, settings: dict[str, Any]) -> Iterable[int]:
    """Submit all at once; the exit codes come as the jobs end."""
    try:
        import cloudpickle
        import submitit
    except ImportError:
        raise SystemExit(
            "error: slurm needs submitit, which is not installed; install the extra `slurm`:"
            " pip install 'mhc-lightning[slurm]'"
        ) from None
    for function in (execute, show):  # a job does not find the folder of these modules
        cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    log = folder / "slurm"
    try:
        executor = submitit.AutoExecutor(folder=log, cluster=settings.pop("cluster", None))
        if executor.cluster == "slurm":  # where Lightning expects one task for each device
            settings.setdefault("tasks_per_node", settings.get("gpus_per_node", 1))
        executor.update_parameters(
            **{k if k in _OF_SUBMITIT else f"slurm_{k}": v for k, v in settings.items()}
        )
        jobs = [executor.submit(execute, run, folder) for run in runs]
    except (AssertionError, NameError, RuntimeError, ValueError) as error:
        raise SystemExit(f"error: slurm: {str(error).partition(chr(10))[0]}") from error
    print(f"submitted {len(jobs)} jobs; their output is in {log}", file=sys.stderr)

    def exit_code(job: Any) -> int:
        try:
            return int(job.results()[0])  # of its first task
        except submitit.core.utils.UncompletedJobError:  # its output says why
            return 1

    return map(exit_code, jobs)


_OF_SUBMITIT = frozenset(
    ("timeout_min", "mem_gb", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node")
)


@dataclass(frozen=True)
class Words:
    """What a recipe was called with.

    Attributes:
        settings: The recipe's own, by name.
        slurm: Those of SLURM, if any was named (``slurm.partition=NAME``).
        jobs: How many runs at a time (``jobs=N``).
        overrides: All others, for `fit`.
    """

    settings: dict[str, str]
    slurm: dict[str, Any] | None
    jobs: int
    overrides: tuple[str, ...]


def read_words(words: Iterable[str], defaults: dict[str, str]) -> Words:
    """Sort out the words of a recipe's command line.

    Args:
        words: ``key=value``.
        defaults: The recipe's own keys with their values.

    Raises:
        SystemExit: ``jobs`` is not a positive integer.
    """
    settings, slurm, overrides, jobs = dict(defaults), {}, [], "1"
    for word in words:
        key, _, value = word.partition("=")
        if key in settings:
            settings[key] = value
        elif key.startswith("slurm."):
            slurm[key.removeprefix("slurm.")] = int(value) if value.isdigit() else value
        elif key == "jobs":
            jobs = value
        else:
            overrides.append(word)
    if not jobs.isdecimal() or int(jobs) < 1:
        raise SystemExit(f"error: jobs={jobs} is not a number of runs, 1 or more")
    return Words(settings, slurm or None, int(jobs), tuple(overrides))


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


def seeds_of(text: str) -> list[int]:
    """The seeds named.

    Raises:
        SystemExit: There is none, or one is no whole number.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise SystemExit(f"error: seeds={text} is not understood; whole numbers, as in seeds=1,2,3")
    return list(dict.fromkeys(map(int, words)))
