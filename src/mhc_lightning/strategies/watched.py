"""The base of strategies whose processes watch over each other."""

import os
import threading
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mhc_lightning.strategies.fault_watch import FaultWatch
from mhc_lightning.strategies.main_thread import Activity
from mhc_lightning.strategies.whole_files import WholeFileStrategy

_MARGIN_SECONDS = 60  # for the watch to name the cause before a communication gives up


class WatchedStrategy(WholeFileStrategy):
    """If a process fails or hangs, every other one prints which and why, and ends.

    Args:
        timeout_seconds: How long a process may wait for another.
        settings: Lightning's.

    Attributes:
        activity: What the main thread is doing.
    """

    def __init__(self, timeout_seconds: float, **settings: Any) -> None:
        super().__init__(timeout=timedelta(seconds=timeout_seconds + _MARGIN_SECONDS), **settings)
        self.activity = Activity()
        self._timeout_seconds = timeout_seconds
        self._watch: FaultWatch | None = None

    def start_watch(self, part: str) -> None:
        """Begin to watch; every process has to call this, and then to wait for the others.

        Args:
            part: What of the network this process holds, for reports.
        """
        if self._watch is not None or self.world_size == 1:
            return
        kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._watch = FaultWatch(
            dist.distributed_c10d._get_default_store(),
            self.global_rank,
            self.world_size,
            f"rank {self.global_rank} ({part})",
            self._doing,
            self._timeout_seconds,
            "the launcher, where processes meet," if kept_by_launcher else None,
            waits_show=self.root_device.type == "cpu",
            leave=self._end_launched,
        )
        self._watch.start()
        _relieve_observer()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's."""
        with self.activity.during("the training step"):
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's."""
        with self.activity.during("validation"):
            return super().validation_step(*args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's training step, then the optimizer's."""
        with self.activity.during("the optimizer's step"):
            return super().optimizer_step(*args, **kwargs)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint."""
        with self.activity.during("a checkpoint"):
            super().save_checkpoint(*args, **kwargs)

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other processes, or learn from them what the cause was."""
        super().on_exception(exception)
        # A run that is told to stop does so everywhere, and has nothing to blame.
        if self._watch is not None and not isinstance(exception, SIGTERMException):
            self._watch.report(exception)

    def teardown(self) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.end()
            self._watch = None
        super().teardown()

    def _doing(self) -> str:
        trainer = getattr(self.lightning_module, "_trainer", None)  # none before and after a run
        return f"step {1 + getattr(trainer, 'global_step', 0)}, {self.activity}"

    def _end_launched(self) -> None:
        """End the processes that Lightning's launcher has started from this one."""
        for process in getattr(self.launcher, "procs", ()):
            process.kill()  # one that was stopped would not heed anything else


def _relieve_observer() -> None:
    """Have Lightning's observer of the processes it started end; the watch does what it does.

    It kills all of them as soon as one has died, before any can say which that was.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []
