"""Names the fault of the machine or of another process that ended a run, apart from bugs."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning.pytorch as pl


@contextlib.contextmanager
def named_faults(trainer: "pl.Trainer") -> Iterator[None]:
    """Raise a fault of the machine or of another process in place of errors that follow.

    Raises:
        RunFaultError: A process of the run died, hung, failed or ran out of memory.
        KeyboardInterrupt: In place of the exit that Lightning makes of it.
    """
    from mhc_lightning.errors import RunFaultError
    from mhc_lightning.strategies.faults import machine_fault
    from mhc_lightning.strategies.watched_strategy import WatchedStrategy

    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    except Exception as error:
        strategy = trainer.strategy
        fault = strategy.fault if isinstance(strategy, WatchedStrategy) else None
        if fault is None and (text := machine_fault(error)) is not None:
            fault = RunFaultError(text)
        if fault is not None:
            raise fault from error
        raise
