"""Part `connection`: whole connections, forward and backward, ours beside others'.

The sub-layer hands its input on as its output, so nothing but the connection is timed. A chain of
several is where seams can be fused; times are given per sub-layer.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu_bench import Bench, attempt, release_memory
from gpu_results import Results
from kernel_traffic import least_of_a_connection
from mhc_lightning.modules import (
    HyperConnection,
    ManifoldHyperConnection,
    SinglePassHyperConnection,
)
from mhc_lightning.modules.connection import Connection, Unmerged
from peers import PlainConnection, importable_peers
from timing import kernels

CHAIN = 4  # sub-layers
Built = tuple[nn.Module, Callable[[Tensor], Tensor]]  # the parameters, and what is timed


def measure_connections(
    bench: Bench, results: Results, streams: list[int], widths: list[int]
) -> None:
    """Fill ``results`` for every shape."""
    tokens = 8 if bench.toy else 32768
    if results.wants(operation="copy"):
        results.add(operation="copy", bytes_per_second=bench.copy_bandwidth())
    for n, width in itertools.product(streams, widths):
        torch._dynamo.reset()
        shape = {"n": n, "width": width, "dtype": "bfloat16", "tokens": tokens}
        for name, (choice, length, build) in implementations(bench, n, width).items():
            key = {"operation": "connection", "implementation": name, **shape}
            if results.wants(**key):
                found = attempt(partial(_measure, bench, tokens, n, width, choice, length, build))
                size = least_of_a_connection(n) * width * tokens * torch.bfloat16.itemsize
                results.add(**key, bytes=size, sub_layers=length, **found)
                release_memory()


def implementations(
    bench: Bench, n: int, width: int
) -> dict[str, tuple[str, int, Callable[[], Built]]]:
    """By name: the kernels' choice, the number of sub-layers, and what builds the function."""

    def ours(kind: type[Connection], fused: bool, length: int) -> Built:
        chain = [kind(width, n, index).to(bench.device) for index in range(length)]
        return nn.ModuleList(chain), partial(_fused if fused else _one_by_one, chain)

    def theirs(kind: Callable[..., nn.Module], compiled: bool) -> Built:
        module = kind(width, n).to(bench.device)
        call: Callable = torch.compile(module, dynamic=False) if compiled else module
        return module, lambda x: call(x, _identity)

    length = 2 if bench.toy else CHAIN
    mhc, hc, single = ManifoldHyperConnection, HyperConnection, SinglePassHyperConnection
    found: dict[str, tuple[str, int, Callable[[], Built]]] = {
        "mhc_lightning": ("triton", 1, partial(ours, mhc, False, 1)),
        "mhc_lightning, torch path": ("torch", 1, partial(ours, mhc, False, 1)),
        "mhc_lightning, hc": ("triton", 1, partial(ours, hc, False, 1)),
        "mhc_lightning, chain": ("triton", length, partial(ours, mhc, False, length)),
        "mhc_lightning, chain with fused seams": (
            "triton",
            length,
            partial(ours, mhc, True, length),
        ),
        "mhc_lightning, single pass": ("triton", length, partial(ours, single, True, length)),
        "plain torch": ("torch", 1, partial(theirs, PlainConnection, False)),
    }
    for name, kind in importable_peers().items():
        if name != "liger" or n & (n - 1) == 0:
            found[name] = ("torch", 1, partial(theirs, kind, False))
    if not bench.toy:  # compiling needs a C++ compiler on a CPU, and says nothing there
        found["plain torch, compiled"] = ("torch", 1, partial(theirs, PlainConnection, True))
        if "transformers" in found:
            kind = importable_peers()["transformers"]
            found["transformers, compiled"] = ("torch", 1, partial(theirs, kind, True))
    return found


def _measure(
    bench: Bench,
    tokens: int,
    n: int,
    width: int,
    choice: str,
    length: int,
    build: Callable[[], Built],
) -> dict[str, Any]:
    module, call = build()
    shape = (8, tokens // 8, n, width)  # some peers want sequences
    x = torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(shape, device=bench.device, dtype=torch.bfloat16)
    parameters = list(module.parameters())

    def step() -> object:
        merged = call(x)
        return torch.autograd.grad(merged, [x, *parameters], grad, allow_unused=True)

    with kernels(choice):
        found: dict[str, Any] = {"seconds": _per_sub_layer(bench.seconds(step), length)}
        if not bench.toy:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            graphed = attempt(lambda: {"seconds": bench.graph_seconds(step)})
            found["graph_seconds"] = _per_sub_layer(graphed.get("seconds"), length)
    return found


def _per_sub_layer(seconds: dict[str, float] | None, length: int) -> dict[str, float] | None:
    return seconds and {name: value / length for name, value in seconds.items()}


def _identity(x: Tensor) -> Tensor:
    return x


def _one_by_one(chain: Sequence[Connection], streams: Tensor) -> Tensor:
    carry = None
    for connection in chain:
        u, state = connection.read(streams, carry)
        streams, carry = connection.write(streams, u, state)
    return streams


def _fused(chain: Sequence[Connection], streams: Tensor) -> Tensor:
    """As the network does it: each connection merges for the one before while it reads."""
    u, state = chain[0].read(streams)
    for index in range(1, len(chain)):
        streams, u, state = chain[index].follow(Unmerged(chain[index - 1], streams, u, state))
    return Unmerged(chain[-1], streams, u, state).merge()[0]
