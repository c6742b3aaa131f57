"""Finds block sizes for a shape by measurement, one kernel after the other.

The search starts from a kernel's present block sizes. It goes to the best of their neighbours (one
of the four numbers doubled or halved, stages one more or less) as long as a neighbour is faster. A
neighbour that does not compile for the device, or whose results differ, is left out.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mhc_lightning.kernels.triton_support.block_sizes import Config, Lookup, choose, noted_lookups
from mhc_lightning.kernels.triton_support.workloads import Workload

_GAIN = 0.98  # the largest share of the time before for which a step of the search pays
_STEPS = 4
# The largest sensible values; matrix products want at least 16 of either block size.
_MOST = Config(block_tokens=256, block_width=4096, num_warps=16, num_stages=5)
_LEAST = Config(block_tokens=1, block_width=16, num_warps=1, num_stages=1)
_LEAST_OF_PRODUCTS = _LEAST._replace(block_tokens=16)


class Choice(NamedTuple):
    """The result of the search for one kernel at one shape.

    Attributes:
        lookup: The kernel, the shape, and the block sizes before.
        config: The best block sizes.
        before: Seconds of a run with the block sizes before.
        after: Seconds of a run with the best block sizes.
        tried: Number of block sizes measured.
    """

    lookup: Lookup
    config: Config
    before: float
    after: float
    tried: int


def tune(
    workloads: dict[str, Workload], names: list[str], seconds: Callable[[Callable], float]
) -> Iterator[Choice]:
    """Tune the kernels of some workloads, and yield each choice once it is made.

    Args:
        workloads: Kernels with their arguments, on the device.
        names: Which of them to tune.
        seconds: Times a call.
    """
    for name in names:
        workload = workloads[name]
        with noted_lookups() as lookups:
            expected = workload.run()
        lookup = next(lookup for lookup in lookups if lookup.kernel == name)

        def measured(
            config: Config,
            name: str = name,
            workload: Workload = workload,
            expected: object = expected,
        ) -> float:
            with choose(name, config):
                try:
                    same = _agree(workload.run(), expected)
                    return seconds(workload.run) if same else math.inf
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # Triton has many ways to refuse block sizes, some undocumented
                    return math.inf

        yield search(lookup, measured)


def search(lookup: Lookup, seconds: Callable[[Config], float]) -> Choice:
    """Go from a kernel's block sizes to better ones, as far as it pays.

    Args:
        lookup: The kernel, and the block sizes to start from.
        seconds: Time of a run with some block sizes; infinite if these cannot be used.
    """
    times = {lookup.config: seconds(lookup.config)}
    best = lookup.config
    for _ in range(_STEPS):
        for config in neighbours(lookup.kernel, best):
            if config not in times:
                times[config] = seconds(config)
        fastest = min(times, key=lambda config: times[config])
        if not times[fastest] <= _GAIN * times[best]:
            break
        best = fastest
    return Choice(lookup, best, times[lookup.config], times[best], len(times))


def neighbours(kernel: str, config: Config) -> list[Config]:
    """Block sizes that differ from `config` in one number."""
    least = _LEAST_OF_PRODUCTS if "project" in kernel else _LEAST
    changes = {
        name: (getattr(config, name) * 2, getattr(config, name) // 2)
        for name in ("block_tokens", "block_width", "num_warps")
        if name != "block_width" or config.block_width > 1  # 1: the kernel has no such block
    }
    changes["num_stages"] = (config.num_stages + 1, config.num_stages - 1)
    return [
        config._replace(**{name: value})
        for name, values in changes.items()
        for value in values
        if getattr(least, name) <= value <= getattr(_MOST, name)
    ]


def _agree(results: object, expected: object) -> bool:
    """True if results agree to rounding; partial sums are compared after they are added up."""
    for ours, theirs in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        if not isinstance(ours, Tensor) or ours.numel() == 0:
            continue
        if ours.shape != theirs.shape:
            ours, theirs = ours.sum(0), theirs.sum(0)
        largest = theirs.abs().max().float()
        if not (ours.float() - theirs.float()).abs().max() <= 1e-2 * largest:
            return False
    return True
