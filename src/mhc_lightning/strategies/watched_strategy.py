"""What strategies have in common whose processes watch over each other."""

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mhc_lightning.errors import RunFaultError, UserError
from mhc_lightning.exit_codes import ExitCode
from mhc_lightning.strategies.fault_watch import FaultWatch
from mhc_lightning.strategies.launcher import WatchingLauncher
from mhc_lightning.strategies.main_thread import Activity

_MARGIN_SECONDS = 60  # for the watch to name the cause before a communication gives up


class WatchedStrategy(ParallelStrategy):
    """If a process fails, dies or hangs, the others print which and why in one line, and end.

    To be put before one of Lightning's strategies that starts its processes by a script or finds
    them started.

    Args:
        timeout_seconds: How long a process may wait for another.
        settings: Of the strategy behind.

    Attributes:
        activity: What the main thread is doing.
        fault: What ended the run, if that was another process or the machine.

    Raises:
        UserError: There is no time to wait.
    """

    _backward_waits = False

    def __init__(self, timeout_seconds: float = 1800, **settings: Any) -> None:
        if not timeout_seconds > 0:
            raise UserError(f"strategy.timeout_seconds must be above 0, not {timeout_seconds}")
        settings["timeout"] = timedelta(seconds=timeout_seconds + _MARGIN_SECONDS)
        super().__init__(**settings)
        self.activity = Activity()
        self.fault: RunFaultError | None = None
        self._timeout_seconds = timeout_seconds
        self._watch: FaultWatch | None = None

    def start_watch(self, part: str | None = None) -> None:
        """Begin to watch; every process has to call this, and then to wait for the others.

        Args:
            part: What of the network this process holds, for reports; may be told later, too.
        """
        if self.world_size == 1:
            return
        name = f"rank {self.global_rank}" + (f" ({part})" if part else "")
        if self._watch is not None:
            self._watch.call(name)
            return
        kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        launcher: Any = self.launcher
        self._watch = FaultWatch(
            dist.distributed_c10d._get_default_store(),
            self.global_rank,
            self.world_size,
            name,
            self._doing,
            self._timeout_seconds,
            "the launcher, where processes meet," if kept_by_launcher else None,
            waits_show=self.root_device.type == "cpu",
            backward_waits=self._backward_waits,
            ended=launcher.ended,
            leave=launcher.end_others,
            shared_output=launcher.shared_output,
        )
        self._watch.start()
        launcher.stop_watching()

    def setup_environment(self) -> None:
        """Let the processes meet, and watch over each other from then on."""
        super().setup_environment()
        self.start_watch()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's."""
        with self.activity.during("the training step"):
            return super().training_step(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backward pass."""
        with self.activity.during("the backward pass"):
            return super().backward(*args, **kwargs)

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
        if isinstance(exception, SIGTERMException):
            return
        if self._watch is not None:
            fault, printed = self._watch.report(exception)
            if printed or fault.code == ExitCode.RUN_FAULT:
                self.fault = RunFaultError(fault.text, fault.code, printed=printed)
        elif isinstance(self.launcher, WatchingLauncher):
            self.launcher.end_others()  # they would wait for this one, which has more to say

    def teardown(self) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.end()
            self._watch = None
        super().teardown()

    def _configure_launcher(self) -> None:
        strategy: Any = self  # the one behind has processes and nodes
        self._launcher = WatchingLauncher(
            strategy.cluster_environment, strategy.num_processes, strategy.num_nodes
        )

    def _doing(self) -> str:
        trainer = getattr(self.lightning_module, "_trainer", None)  # none before and after a run
        return f"step {1 + getattr(trainer, 'global_step', 0)}, {self.activity}"
