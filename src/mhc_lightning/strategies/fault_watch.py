"""A watch of processes over each other: it names the first fault, and ends those that wait."""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from mhc_lightning.exit_codes import ExitCode
from mhc_lightning.strategies.faults import Fault, fault_of, how_it_ended
from mhc_lightning.strategies.main_thread import Sight, ThreadView

_BEAT_SECONDS = 0.5
_SILENT_SECONDS = 2.0  # without a beat, when something has gone wrong already
_LOST_SECONDS = 60.0  # without a beat, when nothing else is known
_GRACE_SECONDS = 10.0  # for a process to end by itself once a fault is known
_STALLED = "(strategy.timeout_seconds)"


class _Beat(NamedTuple):
    """The last heartbeat of a process, and the time at which this process first read it."""

    text: str
    since: float
    sight: Sight
    doing: str
    name: str = ""

    @property
    def awaited(self) -> bool:
        return self.text not in ("", "done")


class FaultWatch(threading.Thread):
    """Watches over all processes of a run, by a thread in each.

    - A process that raises an exception reports it.
    - A process that was killed, stopped or cut off no longer sends heartbeats.
    - A process whose main thread hangs goes on sending heartbeats. Each heartbeat says if the main
      thread is in a communication, and for how long it has been at the same place. When a process
      has waited for `timeout` seconds, the fault lies with the processes that are not in a
      communication.

    A process that is busy alone for long (compilation, a checkpoint, its data) is therefore no
    fault until another process has waited for `timeout` seconds. A communication would not survive
    that wait anyway.

    Every other process prints the first fault of a run; of processes that share a standard error,
    one prints it. Each process ends at most `_GRACE_SECONDS` later, because its main thread would
    wait in vain. The process that hangs shows its stack before it ends.

    Args:
        store: Shared by all processes.
        rank: The rank of this process.
        world_size: The number of processes.
        name: The name of this process in messages; `call` changes it.
        doing: Gives the activity of the main thread; called by another thread.
        timeout: Longest time in seconds that a process waits for another.
        meeting_point: The holder of the store, if that is not rank 0.
        waits_show: True if a communication keeps the main thread until it is done, as with gloo.
            With NCCL it does not: there the fault is that all main threads stay at the same place
            for `timeout` seconds, and the message names all. (Not run on a GPU yet.)
        backward_waits: True if backward passes communicate without a frame in Python (DDP).
        ended: Gives the return codes of ended processes that this one started, by rank.
        leave: Called before the watch ends this process.
        shared_output: Name of the standard error that this process shares with others; empty if
            this process has its own.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        name: str,
        doing: Callable[[], str],
        timeout: float,
        meeting_point: str | None = None,
        waits_show: bool = True,
        backward_waits: bool = False,
        ended: Callable[[], dict[int, int]] = dict,
        leave: Callable[[], None] = lambda: None,
        shared_output: str = "",
    ) -> None:
        super().__init__(daemon=True, name="fault-watch")
        # A connection of its own: a store answers one thread at a time.
        self._store = dist.PrefixStore("fault_watch", store.clone())  # type: ignore[attr-defined]
        self._rank, self._own_name = rank, name
        self._doing, self._main = doing, ThreadView(backward_waits)
        self._timeout, self._lost = timeout, min(_LOST_SECONDS, timeout)
        self._meeting_point, self._waits_show = meeting_point, waits_show
        self._ended, self._leave = ended, leave
        self._shared_output = shared_output
        self._lock = threading.Lock()
        self._done = False
        self._printed = False
        self._store_is_lost = False
        self._fault: Fault | None = None
        self._count = 0
        self._answered = time.monotonic()
        nothing = _Beat("", self._answered, Sight(False, 0.0, ""), "")
        self._beats = {other: nothing for other in range(world_size) if other != rank}
        self._beat()

    def run(self) -> None:
        """Wait for a fault, until `end`.

        Another thread talks to the store, because the store may not answer if the faulty process
        holds it.
        """
        threading.Thread(target=self._talk, daemon=True, name="fault-watch-talk").start()
        while not self._done:
            if self._fault is None and time.monotonic() - self._answered > self._lost:
                self._store_is_lost = True
                self._fault = _lost(
                    self._holder, "gives no sign of life: it was stopped or cut off"
                )
            if self._fault is not None:
                self._print(self._fault)
                if self._own_name in self._fault.text and _STALLED in self._fault.text:
                    faulthandler.dump_traceback()
                time.sleep(_GRACE_SECONDS)
                if self._done:
                    return
                self._leave()
                os._exit(self._fault.code)
            time.sleep(_BEAT_SECONDS)

    def call(self, name: str) -> None:
        """Rename this process, for the others too: it may end before its next heartbeat."""
        self._own_name = name
        with contextlib.suppress(Exception):  # the store is gone: the watch finds that out itself
            self._beat()

    def report(self, error: BaseException) -> tuple[Fault, bool]:
        """Report an exception in this process, unless it follows from another process's fault.

        The exception follows from another fault if another process reported one before, or sends no
        heartbeat within some seconds.

        Returns:
            The first fault of the run, and True if it is printed, here or by a process with the
            same standard error. The exception's handler prints this process's own fault, unless
            other processes share its standard error.
        """
        own = fault_of(self._own_name, self._doing(), error)
        try:
            until = time.monotonic() + _SILENT_SECONDS + 2 * _BEAT_SECONDS
            fault = self._look(_SILENT_SECONDS)
            while fault is None and own.follows and time.monotonic() < until:
                time.sleep(_BEAT_SECONDS)
                fault = self._look(_SILENT_SECONDS)
            first = self._agree(fault or own)
        except Exception:
            first = self._fault or self._holder_is_gone()
        others = first.text != own.text and not first.code == own.code == ExitCode.INTERRUPTED
        says_all = own.code not in (ExitCode.BUG, ExitCode.INTERRUPTED)  # a bug has a traceback
        printed = others or (bool(self._shared_output) and says_all)
        if printed:
            self._print(first)
        self._printed = True
        with contextlib.suppress(Exception):  # if the store is gone, the fault is printed already
            self._let_others_read()
        return first, printed

    def end(self) -> None:
        """Stop, and tell the other processes not to expect heartbeats any more."""
        self._done = True
        try:
            with self._lock:
                self._store.set(f"beat/{self._rank}", "done")
        except Exception:  # no process is left that could expect heartbeats
            return

    def _talk(self) -> None:
        while not self._done:
            try:
                self._beat()
                fault = self._look(self._lost)
                if fault is not None and self._fault is None and not self._done:
                    first = self._agree(fault)
                    self._print(first)
                    self._fault = first
            except Exception:
                self._fault = self._fault or self._holder_is_gone()
                return
            self._answered = time.monotonic()
            time.sleep(_BEAT_SECONDS)

    @property
    def _holder(self) -> str:
        """The name of the store's holder."""
        return self._meeting_point or self._name_of(0)

    def _holder_is_gone(self) -> Fault:
        self._store_is_lost = True
        at = "" if self._meeting_point else self._at(0)
        return _lost(self._holder, f"is gone{at}: it was killed or cut off")

    def _beat(self) -> None:
        sight = self._main.look()
        with self._lock:
            if not self._done:
                self._count += 1
                text = json.dumps([self._count, *sight, self._doing(), self._own_name])
                self._store.set(f"beat/{self._rank}", text)
                self._own = _parsed(text, 0.0)

    def _look(self, lost: float) -> Fault | None:
        """The reported fault, or one that heartbeats show."""
        with self._lock:
            if known := self._get("fault"):
                return Fault(*json.loads(known))
            now = time.monotonic()
            ended = self._ended()
            for other, last in list(self._beats.items()):
                text = self._get(f"beat/{other}")
                if text != last.text:
                    self._beats[other] = last = _parsed(text, now)
                if not last.awaited:
                    continue
                if other in ended:
                    how = how_it_ended(ended[other]) + self._at(other)
                    return _lost(self._name_of(other), how)
                if now - last.since > lost:
                    how = f"gives no sign of life{self._at(other)}: it was killed or cut off"
                    return _lost(self._name_of(other), how)
        return self._stalled()

    def _stalled(self) -> Fault | None:
        """The fault of processes that others have waited for too long; None if there are none."""
        known = sorted({self._rank: self._own, **self._beats}.items())
        beats = {rank: beat for rank, beat in known if beat.awaited}
        still = [beat.sight.still for beat in beats.values()]
        waiting = [beat.sight.still for beat in beats.values() if beat.sight.waits]
        if max(waiting, default=0.0) < self._timeout and (
            self._waits_show or min(still, default=0.0) < self._timeout
        ):
            return None
        causes = {rank: beat for rank, beat in beats.items() if not beat.sight.waits}
        alone = causes and waiting
        stalled = ", ".join(
            f"{self._name_of(rank)}{' hangs' if alone else ''} at {beat.doing} ({beat.sight.where})"
            for rank, beat in (causes if alone else beats).items()
        )
        for_long = f"for {self._timeout:g} s {_STALLED}"
        if alone:
            return _lost(f"{stalled}:", f"others have waited {for_long}")
        return _lost(f"{stalled}:", f"none has got any further {for_long}")

    def _agree(self, fault: Fault) -> Fault:
        """The first fault that any process reported."""
        with self._lock:
            first = self._store.compare_set("fault", "", json.dumps(fault)).decode()
            self._store.set(f"read/{self._rank}", "yes")
        return Fault(*json.loads(first))

    def _let_others_read(self) -> None:
        """Give the others time to read the fault: the store may end with this process."""
        until = time.monotonic() + 8 * _BEAT_SECONDS
        while time.monotonic() < until:
            with self._lock:
                ended = self._ended()
                waiting = [r for r, b in self._beats.items() if b.awaited and r not in ended]
                if all(self._get(f"read/{rank}") for rank in waiting):
                    return
            time.sleep(_BEAT_SECONDS / 5)

    def _get(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _name_of(self, rank: int) -> str:
        name = self._own_name if rank == self._rank else self._beats[rank].name
        return name or f"rank {rank}"

    def _at(self, rank: int) -> str:
        """A process's activity at its last heartbeat."""
        beat = self._beats.get(rank)
        return f" at {beat.doing}" if beat is not None and beat.doing else ""

    def _print(self, fault: Fault) -> None:
        """Print a fault once, unless a process with the same standard error has printed it."""
        if not self._printed:
            self._printed = True
            if self._may_print():
                print(f"error: {fault.text}", file=sys.stderr, flush=True)

    def _may_print(self) -> bool:
        if not self._shared_output or self._store_is_lost:  # two lines are better than none
            return True
        try:
            with self._lock:
                key = f"printed/{self._shared_output}"
                return self._store.compare_set(key, "", str(self._rank)).decode() == str(self._rank)
        except Exception:
            return True


def _lost(who: str, how: str) -> Fault:
    return Fault(f"{who} {how}", ExitCode.RUN_FAULT)


def _parsed(text: str, now: float) -> _Beat:
    if text in ("", "done"):
        return _Beat(text, now, Sight(False, 0.0, ""), "")
    values: list[Any] = json.loads(text)
    return _Beat(text, now, Sight(*values[1:4]), *values[4:])
