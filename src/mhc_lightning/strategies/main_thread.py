"""The activity of a process's main thread, as seen by another of its threads."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

_TORCH = str(Path(torch.__file__).parent)
_COMMUNICATION = str(Path(dist.__file__).parent)
_WAITING = str(Path(__file__).with_name("waiting.py"))  # for what was begun before
_BACKWARD = str(Path(torch.__file__).parent / "autograd" / "graph.py")  # where the engine runs
_DISPATCHER = str(Path(torch.__file__).parent / "_ops.py")  # functional collectives wait in it


class Activity:
    """Names of what the main thread is doing; other threads may read the innermost at any time."""

    def __init__(self) -> None:
        self._names = ["start-up"]

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Name the activity within the block."""
        self._names.append(name)
        try:
            yield
        finally:
            self._names.pop()
            self._names[0] = "between steps"

    def __str__(self) -> str:
        """The innermost name."""
        return self._names[-1]


class Sight(NamedTuple):
    """The state of a thread at one look.

    Attributes:
        waits: True if the thread is in a communication with other processes.
        still: Seconds for which consecutive looks have seen the thread at the same place.
        where: The place in the innermost code that is not torch's.
    """

    waits: bool
    still: float
    where: str


class ThreadView:
    """Looks at the stack of the thread that created it; this costs that thread nothing.

    Args:
        backward_waits: True to count a backward pass as a communication, for strategies that
            communicate in it without a frame in Python.
    """

    def __init__(self, backward_waits: bool = False) -> None:
        self._waiting = (_COMMUNICATION, _WAITING, *((_BACKWARD,) if backward_waits else ()))
        self._thread = threading.get_ident()
        self._place: tuple[tuple[int, int], ...] = ()
        self._since = time.monotonic()

    def look(self) -> Sight:
        """The thread's present state. Call this often: each look compares with the last one."""
        frame = sys._current_frames().get(self._thread)
        place, where, files = [], "", []
        while frame is not None:
            file = frame.f_code.co_filename
            place.append((id(frame.f_code), frame.f_lasti))
            files.append(file)
            if not where and not file.startswith((_TORCH, "<")):
                where = f"{Path(file).name}:{frame.f_lineno}, in {frame.f_code.co_name}"
            frame = frame.f_back
        now = time.monotonic()
        if tuple(place) != self._place:
            self._place, self._since = tuple(place), now
        innermost = next((file for file in files if file != _DISPATCHER), "")
        return Sight(innermost.startswith(self._waiting), now - self._since, where)
