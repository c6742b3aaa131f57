"""The base of strategies whose processes watch over each other."""

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

_MARGIN_SECONDS = 60  # the watch names the cause before a communication times out


class WatchedStrategy(ParallelStrategy):
    """If a process fails, dies or hangs, the others print which and why in one line, and end.

    Inherit from it before one of Lightning's strategies that starts its processes by a script, or
    is started by a launcher.

    Args:
        timeout_seconds: Longest time that a process waits for another.
        settings: Those of Lightning's strategy.

    Attributes:
        activity: The activity of the main thread.
        fault: The fault that ended the run; set if another process or the machine caused it, or if
            it is printed already.

    Raises:
        UserError: `timeout_seconds` is not above 0.
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
        """Begin to watch. Every process must call this, and then waits for the others.

        Args:
            part: The part of the network that this process holds, for messages. A later call can
                set it.
        """
        if self.world_size == 1:
            return
        name = f"rank {self.global_rank}" + (f" ({part})" if part else "")
        if self._watch is not None:
            self._watch.call(name)
            return
        store_is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        launcher: Any = self.launcher
        self._watch = FaultWatch(
            dist.distributed_c10d._get_default_store(),
            self.global_rank,
            self.world_size,
            name,
            self._doing,
            self._timeout_seconds,
            "the launcher, where processes meet," if store_is_launchers else None,
            waits_show=self.root_device.type == "cpu",
            backward_waits=self._backward_waits,
            ended=launcher.ended,
            leave=launcher.end_others,
            shared_output=launcher.shared_output,
        )
        self._watch.start()
        launcher.stop_watching()

    def setup_environment(self) -> None:
        """Let the processes meet, and begin to watch."""
        super().setup_environment()
        self.start_watch()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step, with a name for the watch."""
        with self.activity.during("the training step"):
            return super().training_step(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backward pass."""
        with self.activity.during("the backward pass"):
            return super().backward(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step, with a name for the watch."""
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
        """Report the exception to the other processes, or learn the cause from them."""
        super().on_exception(exception)
        # SIGTERM ends all processes alike: it is no fault.
        if isinstance(exception, SIGTERMException):
            return
        if self._watch is not None:
            fault, printed = self._watch.report(exception)
            if printed or fault.code == ExitCode.RUN_FAULT:
                self.fault = RunFaultError(fault.text, fault.code, printed=printed)
        elif isinstance(self.launcher, WatchingLauncher):
            self.launcher.end_others()  # they would wait for this process

    def teardown(self) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.end()
            self._watch = None
        super().teardown()

    def _configure_launcher(self) -> None:
        strategy: Any = self  # Lightning's strategy has processes and nodes
        self._launcher = WatchingLauncher(
            strategy.cluster_environment, strategy.num_processes, strategy.num_nodes
        )

    def _doing(self) -> str:
        trainer = getattr(self.lightning_module, "_trainer", None)  # none before and after a run
        return f"step {1 + getattr(trainer, 'global_step', 0)}, {self.activity}"
