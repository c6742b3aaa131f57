"""SIGTERM to a run: all processes agree on it at a step, and end once that step is saved."""

import signal
import threading
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException


class Termination:
    """Handles SIGTERM instead of Lightning, which may stop between two micro-batches of a step.

    Attributes:
        agreed: True once all processes know that the run is to end.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._signalled = False

    def listen(self) -> None:
        """Note SIGTERM from now on, in a process's main thread."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def agree(self, trainer: pl.Trainer) -> None:
        """Have the run end everywhere if any process got the signal; every process calls this."""
        self.agreed = trainer.strategy.reduce_boolean_decision(self._signalled, all=False)

    def end(self, trainer: pl.Trainer) -> None:
        """Wait until all processes have saved, then end this one.

        Raises:
            SIGTERMException: Always.
        """
        # A launcher ends the other processes when one leaves, so none leaves before all is written.
        trainer.strategy.barrier("RunCheckpoint")
        raise SIGTERMException(128 + signal.SIGTERM)

    def _note(self, signum: int, frame: Any) -> None:
        self._signalled = True
