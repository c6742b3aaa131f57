"""The run folder: who may write to it, how it is emptied, and its two records."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mhc_lightning.checkpoints.names import BEST, LAST, saved_checkpoints
from mhc_lightning.errors import NonFiniteLossError, RunFaultError, UserError
from mhc_lightning.exit_codes import ExitCode
from mhc_lightning.files.run_layout import CHECKPOINTS, CONFIG, ENVIRONMENT, EVENT_FILES, METRICS

if TYPE_CHECKING:
    import lightning.pytorch as pl

_PACKAGES = (
    *("mhc-lightning", "torch", "lightning", "litdata", "hydra-core", "numpy", "tokenizers"),
    *("torchmetrics", "triton"),
)
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def is_first_process() -> bool:
    """True in the process that writes files; known before torch is imported."""
    for name in _RANK_VARIABLES:
        if name in os.environ and (name != "LOCAL_RANK" or "NODE_RANK" not in os.environ):
            return os.environ[name] == "0"
    # Lightning's own launcher: one process of each node starts the others of that node.
    ranks = (os.environ.get(name, "0") for name in ("NODE_RANK", "GROUP_RANK", "LOCAL_RANK"))
    return all(rank == "0" for rank in ranks)


def holds_run(folder: Path) -> bool:
    """True if a run has written to `folder`."""
    return any(True for _ in _run_files(folder))


def claim(folder: Path, *, resumes: bool, overwrite: bool) -> None:
    """Make sure that this run may write to `folder`, and can.

    Args:
        folder: `output_dir`; made if missing.
        resumes: True if the run continues from a checkpoint.
        overwrite: True if the run that is there may be deleted; `delete_run` does it, once the
            settings of the new one are known to be right.

    Raises:
        UserError: it holds a run that is neither resumed nor overwritten, or cannot be written to.
    """
    if not is_first_process():
        return
    if not resumes and not overwrite and holds_run(folder):
        raise UserError(
            f"{folder} already holds a run; go on with it (ckpt_path=last), choose another"
            " output_dir, or delete it (overwrite=true)"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".aside-probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output_dir {folder} cannot be written to: {error.strerror or error};"
            " choose another, or fix its permissions"
        ) from error


def write_records(folder: Path, config: dict[str, Any], words: list[str], **about: Any) -> None:
    """Write `config.yaml` and `environment.json`, which keeps the records of earlier starts.

    Args:
        folder: The run folder.
        config: The experiment's `record`.
        words: The command line, without the program's name.
        about: More entries for `environment.json`, known only once the run is built.

    Raises:
        UserError: they cannot be written.
    """
    from mhc_lightning.files.atomic import write_text_atomically

    if not is_first_process():
        return
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    record = {**describe_environment(), "arguments": words, **about}
    if before := _read_environment(folder):
        record["earlier"] = [*before.pop("earlier", []), before]
    try:
        write_text_atomically(folder / CONFIG, text)
        _write_environment(folder, record)
    except OSError as error:
        raise UserError(
            f"output_dir {folder} cannot be written to: {error.strerror or error}"
        ) from error


@contextlib.contextmanager
def recorded_end(folder: Path, trainer: "pl.Trainer") -> Iterator[None]:
    """Record in `environment.json` how the run inside ended, and at which step."""
    reason, non_finite = "complete", False
    try:
        yield
    except BaseException as error:
        non_finite = getattr(error, "exit_code", None) == ExitCode.NON_FINITE
        reason = _reason(error)
        raise
    finally:
        end = {
            "reason": reason,
            "non_finite": non_finite,
            "step": trainer.global_step,
            "time": _now(),
        }
        if is_first_process() and (record := _read_environment(folder)):
            with contextlib.suppress(OSError):  # the error that ended the run matters more
                _write_environment(folder, {**record, "ended": end})


def _reason(error: BaseException) -> str:
    if isinstance(error, NonFiniteLossError):
        return f"{error.what} at step {error.step}"
    if isinstance(error, RunFaultError):
        return str(error)[:200]
    known = {"SIGTERMException": "stopped by SIGTERM", "KeyboardInterrupt": "interrupted",
             "SystemExit": "interrupted"}  # fmt: skip
    name = type(error).__name__
    return known.get(name) or f"{name}: {' '.join(str(error).split())}"[:200]


def _read_environment(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _write_environment(folder: Path, record: dict[str, Any]) -> None:
    from mhc_lightning.files.atomic import write_text_atomically

    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_text_atomically(folder / ENVIRONMENT, text + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe_environment() -> dict[str, Any]:
    """Versions, devices, the source's commit, and the command line."""
    import torch

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "device": gpus[0] if gpus else _processor(),
        "devices": gpus,
        "cuda": torch.version.cuda,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "commit": _commit(),
        "command": sys.argv,
        "started": _now(),
    }


def _run_files(folder: Path) -> Any:
    for name in (CONFIG, ENVIRONMENT, METRICS):
        if (folder / name).exists():
            yield folder / name
    if folder.is_dir():
        yield from folder.glob(EVENT_FILES)
        for _, checkpoint in saved_checkpoints(folder / CHECKPOINTS):
            yield checkpoint
        for name in (LAST, BEST):
            if os.path.lexists(link := folder / CHECKPOINTS / name):  # it may lead nowhere
                yield link


def delete_run(folder: Path) -> None:
    """Delete what a run writes, if there is any, and nothing else that may be in the folder.

    Raises:
        UserError: it cannot be deleted.
    """
    if not is_first_process():
        return
    try:
        for path in list(_run_files(folder)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot delete the run in {folder}: {error.strerror or error}; choose another"
            " output_dir"
        ) from error


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source this runs from, with `+changes` if files differ from it."""
    source = Path(__file__).resolve().parent
    if not any((parent / ".git").exists() for parent in source.parents):
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(source), *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    return None
