"""Tells every process of a run which of them failed and why, and ends those that would wait."""

import os
import sys
import threading
import time

import torch.distributed as dist

_BEAT_SECONDS = 0.5
_SILENT_SECONDS = 2.0  # without a beat, when something has gone wrong already
_LOST_SECONDS = 60.0  # without a beat, when nothing else is known
_GRACE_SECONDS = 10.0  # for a process to end by itself once a fault is known


class FaultWatch(threading.Thread):
    """A thread that beats, reads other processes' beats, and reads the first fault of the run.

    A process that raises reports it; one that was killed stops beating. Either is printed on every
    other process, each of which ends at the latest `_GRACE_SECONDS` afterwards: what its main
    thread waits for will not come. A process that hangs goes on beating; the process group's
    timeout is for that.

    Args:
        store: Shared by all processes.
        rank: This process's.
        world_size: Their number.
        name: What to call this process in a report.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, name: str) -> None:
        super().__init__(daemon=True, name="fault-watch")
        # A connection of its own: a store answers one thread at a time.
        self._store = dist.PrefixStore("fault_watch", store.clone())  # type: ignore[attr-defined]
        self._rank = rank
        self._own_name = name
        self._lock = threading.Lock()
        self._done = False
        self._printed = False
        now = time.monotonic()
        self._beats = {other: ("", now) for other in range(world_size) if other != rank}
        self._store.set(f"name/{rank}", name)
        self._beat(0)

    def run(self) -> None:
        """Beat and look, until `end`."""
        count = 0
        while not self._done:
            count += 1
            try:
                self._beat(count)
                fault = self._look(_LOST_SECONDS)
            except Exception:  # the store is gone, and with it the process that holds it
                fault = "the process that the others meet at (rank 0, or the launcher) is gone"
            if fault and not self._done:
                self._print(fault)
                time.sleep(_GRACE_SECONDS)
                if not self._done:
                    os._exit(1)
            time.sleep(_BEAT_SECONDS)

    def report(self, error: BaseException) -> None:
        """Make an exception in this process known, unless it only follows from another's fault.

        It follows if another process reported before or, within some seconds, stops to beat.
        """
        message = " ".join(str(error).split())[:500]
        own = f"{self._own_name} failed: {type(error).__name__}: {message}"
        try:
            follows = _is_from_communication(error)
            until = time.monotonic() + _SILENT_SECONDS + 2 * _BEAT_SECONDS
            fault = self._look(_SILENT_SECONDS)
            while fault is None and follows and time.monotonic() < until:
                time.sleep(_BEAT_SECONDS)
                fault = self._look(_SILENT_SECONDS)
            with self._lock:
                first = self._store.compare_set("fault", "", fault or own).decode()
            if first != own:
                self._print(first)
        except Exception:
            self._print("the process that the others meet at (rank 0, or the launcher) is gone")

    def end(self) -> None:
        """Stop; nobody is to miss this process's beats."""
        self._done = True
        try:
            with self._lock:
                self._store.set(f"beat/{self._rank}", "done")
        except Exception:  # nobody is left who could miss them
            return

    def _beat(self, count: int) -> None:
        with self._lock:
            if not self._done:
                self._store.set(f"beat/{self._rank}", str(count))

    def _look(self, limit: float) -> str | None:
        """The first fault that is known, or that some process has not beaten for so long."""
        with self._lock:
            if self._store.check(["fault"]):
                return self._store.get("fault").decode()
            now = time.monotonic()
            for other, (last, since) in list(self._beats.items()):
                key = f"beat/{other}"
                beat = self._store.get(key).decode() if self._store.check([key]) else ""
                if beat != last:
                    self._beats[other] = beat, now
                elif beat not in ("", "done") and now - since > limit:
                    name = self._name_of(other)
                    return f"{name} gives no sign of life: it was killed or cut off"
        return None

    def _name_of(self, rank: int) -> str:
        key = f"name/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else f"rank {rank}"

    def _print(self, fault: str) -> None:
        if not self._printed:
            self._printed = True
            print(f"error: {fault}", file=sys.stderr, flush=True)


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
