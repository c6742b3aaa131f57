"""Several runs of `fit`: one after the other, some at a time, or as SLURM jobs.

A sweep can be stopped and started again: runs that have ended are skipped, one that was stopped
goes on from its last checkpoint. How each ended is in its `sweep.json`. A run whose loss stopped
being finite has ended too: that is a result.
"""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
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
    """The end of a run.

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
        SystemExit: A run failed, other than by its loss; with its exit code. Or this was stopped.
    """
    runs = list(dict.fromkeys(runs))
    left = [run for run in runs if recorded(run, folder) is None]
    for run in runs:
        if run not in left:
            print(f"{folder / run.name}: has ended before", file=sys.stderr)
    codes: Iterable[int | None]
    if slurm is not None and left:
        codes = _submit(left, folder, dict(slurm))
    else:
        codes = _run_here(left, folder, jobs)
    failed = []
    for run, code in zip(left, codes, strict=True):
        if code not in (FINISHED, DIVERGED, None):
            print(f"error: the run in {folder / run.name} failed", file=sys.stderr)
            failed.append(code if code > 0 else 128 - code)  # of a signal, as shells have it
    if failed:
        raise SystemExit(failed[0])
    outcomes = {run.name: recorded(run, folder) for run in runs}
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def execute(
    run: Run,
    folder: Path,
    own_device: dict[str, str] | None = None,
    stopping: threading.Event | None = None,
) -> int:
    """Begin a run or go on with it; returns the exit code of `fit`.

    If another call is at the same run, this waits for it.

    Args:
        run: What to run.
        folder: The sweep's.
        own_device: Environment variables for one of several at a time: its output goes to
            ``output/NAME.txt``. None shows it.
        stopping: Ends that wait once it is set.

    Raises:
        SystemExit: It was set.
    """
    own = folder / run.name
    with _alone_with(run, folder, stopping) as lock:
        ended = recorded(run, folder)
        if ended is not None:
            return DIVERGED if ended.diverged else FINISHED
        words = ["fit", "--config", run.config, f"output_dir={own}", *run.overrides]
        if (own / "checkpoints" / "last").exists():
            words.append("ckpt_path=last")
        elif own.exists():
            words.append("overwrite=true")  # it was stopped before it saved anything
        _record(run, folder, None, 0.0)
        show(*words)
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            options: dict[str, Any] = {}
            if own_device is not None:
                text = folder / "output" / f"{run.name}.txt"
                text.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(text.open("a", encoding="utf-8"))
                options = {"stdout": file, "stderr": subprocess.STDOUT}
                options["env"] = {**os.environ, **own_device}
            # In a group of its own Ctrl-C does not reach it, which would end it without saving.
            options |= {"pass_fds": lock, "process_group": 0, "stdin": subprocess.DEVNULL}
            code = _wait_for(subprocess.Popen(command(*words), **options))
        seconds = time.monotonic() - began
        if code in (FINISHED, DIVERGED):
            _record(run, folder, code, seconds)
        if own_device is not None:
            ended_how = {FINISHED: "ended", DIVERGED: "diverged"}.get(code, f"failed (see {text})")
            print(f"{own}: {ended_how} after {seconds:.0f} s", file=sys.stderr, flush=True)
        return code


def recorded(run: Run, folder: Path) -> Outcome | None:
    """The end of a run, or None while it has not ended.

    Raises:
        SystemExit: The folder holds a run with other settings.
    """
    file = folder / run.name / RECORD
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["exit_code"] is None and not (file.parent / "checkpoints" / "last").exists():
        return None  # it left nothing to go on with
    if [record["config"], record["overrides"]] != [run.config, list(run.overrides)]:
        raise SystemExit(
            f"error: {file.parent} holds a run with other settings"
            f" ({shlex.join([record['config'], *record['overrides']])}); choose another"
            " output=FOLDER, or delete it"
        )
    return None if record["exit_code"] is None else Outcome(file.parent, record["exit_code"] == 3)


def _record(run: Run, folder: Path, code: int | None, seconds: float) -> None:
    """Write down what is run, and, once it has ended, how."""
    if not _is_first_task():
        return
    file = folder / run.name / RECORD
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "exit_code": code,
        "config": run.config,
        "overrides": list(run.overrides),
        "seconds": round(seconds, 1),
    }
    aside = file.with_name(f".{RECORD}")
    aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    aside.replace(file)


@contextlib.contextmanager
def _alone_with(
    run: Run, folder: Path, stopping: threading.Event | None
) -> Iterator[tuple[int, ...]]:
    """Hold the run's lock; yields its file descriptor, for `fit` to hold it if this is killed."""
    if not _is_first_task():
        yield ()
        return
    file = folder / "locks" / run.name
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        waits = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waits:
                    text = f"{folder / run.name}: waits for another call's"
                    print(text, file=sys.stderr, flush=True)
                waits = True
            time.sleep(0.5)  # instead of a lock that waits, which nothing interrupts
            if stopping is not None and stopping.is_set():
                raise SystemExit(1)
        yield (lock.fileno(),)


def _is_first_task() -> bool:
    """True in the task of a SLURM job that writes, and outside SLURM."""
    return os.environ.get("SLURM_PROCID", "0") == "0"


_running: set["subprocess.Popen[bytes]"] = set()


def _wait_for(process: "subprocess.Popen[bytes]") -> int:
    """Its exit code. If this is interrupted, the process is told to save and end, and may."""
    _running.add(process)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        _running.discard(process)


def _run_here(runs: list[Run], folder: Path, jobs: int) -> list[int | None]:
    """Run some at a time; after a failure none is begun any more. Returns their exit codes.

    Raises:
        SystemExit: By Ctrl-C, SIGTERM or SIGHUP; the runs have saved and can go on.
    """
    stopping = threading.Event()
    devices: SimpleQueue[dict[str, str] | None] = SimpleQueue()
    for device in _own_devices(jobs) if jobs > 1 else [None]:
        devices.put(device)

    def one(run: Run) -> int | None:
        device = devices.get()
        try:
            if stopping.is_set():
                return None
            code = execute(run, folder, device, stopping)
            if code not in (FINISHED, DIVERGED):
                stopping.set()
            return code
        except BaseException:
            stopping.set()
            raise
        finally:
            devices.put(device)

    def stop(number: int, frame: Any) -> None:
        stopping.set()
        for process in list(_running):
            process.terminate()
        print("stopped: the same command goes on", file=sys.stderr)
        raise SystemExit(128 + number)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, stop) for number in signals]
    try:
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, runs))
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _own_devices(jobs: int) -> list[dict[str, str]]:
    """The environment of each of several runs at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (cores or 1) // jobs)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())]
    return [
        {
            "OMP_NUM_THREADS": threads,
            **({"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if len(gpus) > 1 else {}),
        }
        for job in range(jobs)
    ]


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
    log, cluster = folder / "slurm", settings.pop("cluster", None)
    if cluster is None and submitit.AutoExecutor.which() != "slurm":
        raise SystemExit("error: there is no SLURM here (no sbatch); leave out slurm.…")
    try:
        executor = submitit.AutoExecutor(folder=log, cluster=cluster)
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
