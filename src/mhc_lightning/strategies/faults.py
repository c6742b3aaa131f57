"""The cause that ended a process of a run, in one line, and the exit code of the run."""

import signal
from typing import NamedTuple

import torch
import torch.distributed as dist

from mhc_lightning.errors import NonFiniteLossError, UserError, full_disk_message, one_line_message
from mhc_lightning.exit_codes import ExitCode

_KILLED = " (SIGKILL: often the kernel, when memory runs out)"


class Fault(NamedTuple):
    """The first thing that went wrong in a run.

    Attributes:
        text: One line, which names the process.
        code: The exit code of every process of the run.
        follows: True if the fault may be a mere consequence of another process's end.
    """

    text: str
    code: int
    follows: bool = False


def fault_of(who: str, doing: str, error: BaseException) -> Fault:
    """The fault that an exception in a process is to the run.

    Args:
        who: The process, by name.
        doing: The activity in which it was raised.
        error: The exception.
    """
    message = one_line_message(error)
    if isinstance(error, UserError):
        return Fault(f"{who}, at {doing}: {message}", error.exit_code)
    if isinstance(error, NonFiniteLossError):
        return Fault(f"{who}: {message}", error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Fault(f"{who} was interrupted at {doing}", ExitCode.INTERRUPTED)
    if (text := machine_fault(error)) is not None:
        return Fault(f"{who}, at {doing}: {text}", ExitCode.RUN_FAULT)
    if _is_from_communication(error):
        text = f"{who} lost the others at {doing}: {type(error).__name__}: {message}"
        return Fault(text, ExitCode.RUN_FAULT, follows=True)
    return Fault(f"{who} failed at {doing}: {type(error).__name__}: {message}", ExitCode.BUG)


def machine_fault(error: BaseException) -> str | None:
    """The machine's fault behind an exception, with advice; None for any other cause."""
    message = one_line_message(error)
    if (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in message
    ):
        return (
            f"out of memory ({message.partition('. ')[0]}); use a smaller data.micro_batch_size,"
            " recompute=auto or strategy=fsdp on more devices (`plan` says what a run needs)"
        )
    if isinstance(error, RuntimeError) and message.startswith("DataLoader worker (pid"):
        return (
            f"a process that loads data ended ({message.rstrip('.')}), often killed by the kernel"
            " when memory runs out; go on with ckpt_path=last, perhaps with fewer data.num_workers"
        )
    return full_disk_message(error)


def how_it_ended(returncode: int) -> str:
    """The end of a process in words, by its return code as `subprocess` has it."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    name = "" if -returncode != signal.SIGKILL else _KILLED
    return f"was killed by signal {-returncode}{name}"


def _is_from_communication(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen).lower()
        if isinstance(seen, dist.DistError) or any(
            sign in text for sign in ("gloo", "nccl", "connection closed", "connection reset")
        ):
            return True
        seen = seen.__cause__
    return False
