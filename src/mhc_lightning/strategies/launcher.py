"""Lightning's launcher of processes, which reports those that end before all have met."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from mhc_lightning.exit_codes import ExitCode
from mhc_lightning.strategies.faults import how_it_ended

_POLL_SECONDS = 0.5
_STARTED_BY = "MHC_LIGHTNING_STARTED_BY"  # the first process, in the environment of the others


class WatchingLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, which also knows how the processes that it started have ended.

    The launcher watches until the processes have met and watch over each other (`stop_watching`).
    If a started process ends before, the first process says so and ends the others. If the first
    process ends, the others end too.
    """

    _started_by = int(os.environ.get(_STARTED_BY, "0"))
    _watches = False

    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other processes, in the first process, and call a function."""

        def begin(*args: Any, **kwargs: Any) -> Any:
            _relieve_observer()
            self._watches = True
            threading.Thread(target=self._watch_start, daemon=True, name="start-watch").start()
            return function(*args, **kwargs)

        try:
            return super().launch(begin, *args, trainer=trainer, **kwargs)
        finally:
            self.stop_watching()

    def stop_watching(self) -> None:
        """Leave it to the fault watch to report processes that end."""
        self._watches = False

    @property
    def shared_output(self) -> str:
        """Name of the standard error that the processes of a node share; empty if each has its own.

        Processes that this launcher starts inherit one. Processes of another launcher may each have
        a log of their own.
        """
        started_here = bool(self.procs) or bool(self._started_by)
        return f"node {self.cluster_environment.node_rank()}" if started_here else ""

    def ended(self) -> dict[int, int]:
        """The return codes of started processes that have ended, by rank."""
        first = self.cluster_environment.node_rank() * self.num_processes
        codes = {first + 1 + k: process.poll() for k, process in enumerate(self.procs)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def end_others(self) -> None:
        """Kill the processes that were started from this one."""
        for process in self.procs:
            process.kill()  # a stopped process ignores other signals

    def _call_children_scripts(self) -> None:
        # By default, C++ prints a stack for each connection that the first process ends.
        theirs = {_STARTED_BY: str(os.getpid()), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        added = {name: value for name, value in theirs.items() if name not in os.environ}
        os.environ.update(added)
        try:
            super()._call_children_scripts()
        finally:
            for name in added:
                del os.environ[name]

    def _watch_start(self) -> None:
        while self._watches:
            if self._started_by and os.getppid() != self._started_by:
                self._end("rank 0 ended before the processes of the run had met")
            for rank, code in self.ended().items():
                if code and self._watches:
                    self.end_others()
                    text = (
                        f"rank {rank} {how_it_ended(code)} before the processes of the run had met"
                    )
                    self._end(None if ExitCode.is_explained(code) else text, code)
            time.sleep(_POLL_SECONDS)

    def _end(self, text: str | None, code: int = -1) -> None:
        if text is not None:
            print(f"error: {text}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        keeps_code = code == ExitCode.BUG or ExitCode.is_explained(code)
        os._exit(code if keeps_code else ExitCode.RUN_FAULT)


def _relieve_observer() -> None:
    """End Lightning's observer of started processes.

    The observer kills all processes as soon as one has died, before any can report which one.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []
