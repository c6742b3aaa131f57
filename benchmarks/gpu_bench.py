"""The GPU suite's device and clock: a GPU with its events, or toy sizes without one."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from timing import summary


class Bench:
    """The device, its clock, and the time there is.

    Args:
        toy: Whether to run tiny shapes on the CPU, in Triton's interpreter, without a clock.
        seconds: After how many nothing new is to be begun.
    """

    def __init__(self, toy: bool, seconds: float) -> None:
        self.toy = toy
        self.device = "cpu" if toy else "cuda"
        self._end = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Until nothing new is to be begun."""
        return self._end - time.monotonic()

    @property
    def out_of_time(self) -> bool:
        """True when the time is up."""
        return self.seconds_left < 0

    @property
    def name(self) -> str:
        """The device's name."""
        return "toy" if self.toy else torch.cuda.get_device_name()

    def seconds(self, call: Callable[[], object]) -> dict[str, float] | None:
        """Quartiles of the time of a call by CUDA events, the L2 cache cleared before each run.

        None at toy size: the call is made once, and an interpreter's time says nothing.
        """
        if self.toy:
            call()
            return None
        from triton.testing import do_bench

        milliseconds = do_bench(call, warmup=25, rep=100, return_mode="all")
        return summary([value / 1e3 for value in milliseconds])

    def graph_seconds(self, call: Callable[[], object]) -> dict[str, float] | None:
        """The same, replayed from a CUDA graph: what is left without the cost of launching."""
        if self.toy:
            return None
        from triton.testing import do_bench_cudagraph

        milliseconds = do_bench_cudagraph(call, rep=100, return_mode="all")
        return summary([value / 1e3 for value in milliseconds])

    def copy_bandwidth(self) -> float | None:
        """Bytes per second of a copy of 4 GiB on the device, bytes read and written counted."""
        size = 2**10 if self.toy else 2**32
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        taken = self.seconds(lambda: target.copy_(source))
        return None if taken is None else 2 * size / taken["median"]


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a measurement, or `{"error": …}`: one failure does not end the others."""
    try:
        return measure()
    except Exception as error:  # whatever a peer or a compiler raises is a result here
        line = " ".join(str(error).split())[:300]
        return {"error": f"{type(error).__name__}: {line}"}


def release_memory() -> None:
    """Give back what nobody uses any more: after each model or shape, not after each call."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
