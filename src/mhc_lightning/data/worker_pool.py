"""The work units of a preparation, tokenized in several processes with a progress bar."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from mhc_lightning.data.tokenizers import Tokenizer
from mhc_lightning.data.unit_tokenization import (
    TokenizationOptions,
    is_finished,
    tokenize_unit,
    unit_folder,
)
from mhc_lightning.data.work_units import WorkUnit
from mhc_lightning.errors import UserError
from mhc_lightning.files.atomic import ASIDE

# Forked workers share the loaded libraries. System libraries of other platforms are not fork-safe.
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"


@dataclass(frozen=True)
class TokenizationJob:
    """All work units of one preparation.

    Attributes:
        units: The units, finished or not.
        folder: Folder that holds one folder per unit.
        tokenizer: The tokenizer.
        options: Options of the tokenization.
    """

    units: list[WorkUnit]
    folder: Path
    tokenizer: Tokenizer
    options: TokenizationOptions

    def run(self, unit: int) -> int:
        """Tokenize one unit, and return its number."""
        folder = unit_folder(self.folder, unit)
        tokenize_unit(self.units[unit], folder, self.tokenizer, self.options)
        return unit


def run_units(job: TokenizationJob, num_workers: int | None, progress: bool) -> None:
    """Tokenize every unit that is not finished.

    Args:
        job: The units.
        num_workers: Number of processes; None for one per available core.
        progress: Show a progress bar on standard error.

    Raises:
        UserError: A worker found an error in the input, or died.
    """
    import litdata.streaming.writer  # noqa: F401  # once here, not once in each forked worker

    job.folder.mkdir(exist_ok=True)
    for unfinished in job.folder.glob(f"{ASIDE}*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    units = range(len(job.units))
    open_units = [unit for unit in units if not is_finished(unit_folder(job.folder, unit))]
    for unit in open_units:
        shutil.rmtree(unit_folder(job.folder, unit), ignore_errors=True)
    workers = min(num_workers or _available_cores(), len(open_units))
    done = sum(job.units[unit].input_size for unit in units) - sum(
        job.units[unit].input_size for unit in open_units
    )
    if workers <= 1:
        with _progress_bar(job, done, progress) as advance:
            for unit in open_units:
                advance(job.run(unit))
        return
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context(_START_METHOD), _start_worker, (job, os.getpid())
    ) as pool:
        # The workers fork here, before the progress bar starts a thread.
        futures: list[Future[int]] = [pool.submit(_run_in_worker, unit) for unit in open_units]
        try:
            with _progress_bar(job, done, progress) as advance:
                for future in as_completed(futures):
                    advance(future.result())
        except BrokenProcessPool as error:
            raise UserError(
                "a worker of prepare was killed, probably for lack of memory;"
                f" run it again with num_workers below {workers} (finished work is kept)"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


_job: TokenizationJob | None = None  # set in each worker


def _start_worker(job: TokenizationJob, parent: int) -> None:
    global _job
    _job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends its workers

    def exit_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _run_in_worker(unit: int) -> int:
    assert _job is not None
    return _job.run(unit)


@contextlib.contextmanager
def _progress_bar(
    job: TokenizationJob, done: int, visible: bool
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar; yields a function that counts a unit as done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    total = sum(unit.input_size for unit in job.units)
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as bar:
        task = bar.add_task("tokenizing", total=total, completed=done)
        yield lambda unit: bar.advance(task, job.units[unit].input_size)
