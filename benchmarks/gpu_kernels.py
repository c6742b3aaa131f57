"""Part `kernels`: time of every kernel and operation, forward and backward, and its bandwidth.

The bytes are the fewest that an operation has to move (every stream-sized operand once), so a
share of the copy's bandwidth below 100% is time lost to whatever reason, further traffic included.
"""

import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_bench import Bench, attempt, release_memory
from gpu_results import Results
from mhc_lightning.kernels.backend import MOST_FUSED_STREAMS
from mhc_lightning.kernels.mappings import MappingGrads, MappingRule
from mhc_lightning.kernels.merge_read.operands import MergeReadOperands
from mhc_lightning.kernels.read.operands import Projection, ReadNeeds, ReadOperands
from mhc_lightning.kernels.triton_support.workloads import workloads
from peers import LigerConnection, importable_peers

# Kernels that plain torch has a function for, of the same name, and the operator they belong to.
_PLAIN = {
    "aggregate_forward": "aggregate",
    "aggregate_backward": "aggregate",
    "mean_forward": "expand_mean",
    "expand_backward": "expand_mean",
    "merge_forward": "merge",
    "merge_backward": "merge",
    "replay_forward": "replay",
    "sinkhorn_forward": "sinkhorn",
    "sinkhorn_backward": "sinkhorn",
}


def _module(operator: str, implementation: str) -> ModuleType:
    return import_module(f"mhc_lightning.kernels.{operator}.{implementation}")


class Operation(NamedTuple):
    """One operation in one direction.

    Attributes:
        elements: The fewest stream-sized elements per token it moves, in units of C.
        calls: By implementation, what runs it; built anew for each shape.
    """

    elements: int
    calls: dict[str, Callable[[], object]]


def measure_kernels(
    bench: Bench, results: Results, streams: list[int], widths: list[int], jobs: int
) -> None:
    """Fill ``results`` for every shape.

    Args:
        bench: The device.
        results: Where the rows go.
        streams: Values of n.
        widths: Values of C.
        jobs: Processes that compile our kernels beforehand.
    """
    _measure_copy(bench, results, "before")
    for n in streams:
        if not bench.toy and not bench.out_of_time:
            _compile_ahead(n, widths, jobs)
        for implementations in (("triton",), ("torch", "liger")):
            for width in widths:
                _measure_shape(bench, results, n, width, implementations)
    _measure_copy(bench, results, "after")
    if not bench.toy and 4 in streams:  # last, since compiling takes longer than all else
        for width in widths:
            _measure_shape(bench, results, 4, width, ("torch.compile",))


def _measure_copy(bench: Bench, results: Results, turn: str) -> None:
    if results.wants(operation="copy", turn=turn):
        results.add(operation="copy", turn=turn, bytes_per_second=bench.copy_bandwidth())


def _measure_shape(
    bench: Bench, results: Results, n: int, width: int, implementations: tuple[str, ...]
) -> None:
    if bench.out_of_time:
        results.stopped_early()
        return
    tokens = 4 if bench.toy else 32768
    torch._dynamo.reset()  # or the compiler gives up on a function after some shapes
    release_memory()
    shape = {"n": n, "width": width, "dtype": "bfloat16", "tokens": tokens}
    for name, operation in operations(bench.device, tokens, n, width).items():
        size = operation.elements * width * tokens * torch.bfloat16.itemsize
        for implementation in implementations:
            key = {"operation": name, "implementation": implementation, **shape}
            call = operation.calls.get(implementation)
            if call is not None and results.wants(**key):
                found = attempt(partial(_timed, bench, call))
                results.add(**key, bytes=size, **found)


def _compile_ahead(n: int, widths: list[int], jobs: int) -> None:
    """Run everything of ours once, in several processes: Triton keeps on disk what it compiled."""
    hands = max(1, jobs // len(widths))
    tasks = list(itertools.product([n], widths, range(hands), [hands]))
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_some, tasks))


def _compile_some(task: tuple[int, int, int, int]) -> None:
    """Every ``hands``-th operation at (n, C), on a few tokens."""
    n, width, hand, hands = task
    for operation in list(operations("cuda", 256, n, width).values())[hand::hands]:
        attempt(partial(_value, operation.calls["triton"]))


def _timed(bench: Bench, call: Callable[[], object]) -> dict[str, Any]:
    return {"seconds": bench.seconds(call)}


def _value(call: Callable[[], object]) -> dict[str, Any]:
    return {"value": call()}


def operations(device: str, tokens: int, n: int, width: int) -> dict[str, Operation]:
    """Single kernels, and the compositions that a connection calls, on bfloat16 streams."""
    work = workloads(tokens, n, width, torch.bfloat16, device)
    found = {}
    for name, workload in work.items():
        calls: dict[str, Callable[[], object]] = {"triton": workload.run}
        plain = _PLAIN.get(name)
        if plain is not None:
            assert isinstance(workload.run, partial)
            calls |= _in_torch(getattr(_module(plain, "reference"), name), workload.run.args)
        found[name] = Operation(workload.elements, calls)
    for name, (elements, arguments) in _compositions(device, tokens, n, width).items():
        function = name.replace("seam", "merge_read").replace("single_pass", "merge_read")
        function = function.replace("mappings", "read")
        operator = function.rpartition("_")[0]
        if operator == "merge_read" and n > MOST_FUSED_STREAMS:
            continue
        calls = {"triton": partial(getattr(_module(operator, "triton"), function), *arguments)}
        plain = getattr(_module(operator, "reference"), function)
        found[name] = Operation(elements, calls | _in_torch(plain, arguments))
    if "liger" in importable_peers() and n & (n - 1) == 0:
        for name, call in _liger(device, tokens, n, width).items():
            found[name].calls["liger"] = call
    return found


def _in_torch(function: Callable, arguments: tuple[Any, ...]) -> dict[str, Callable[[], object]]:
    compiled = torch.compile(function, dynamic=False)
    return {
        "torch": partial(function, *arguments),
        "torch.compile": partial(compiled, *arguments),
    }


def _compositions(
    device: str, tokens: int, n: int, width: int
) -> dict[str, tuple[int, tuple[Any, ...]]]:
    """Elements and arguments of reading and of the seam, which both backends have."""
    count = n * n + 2 * n

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    x, kept_grad = (randn(tokens, n, width, dtype=torch.bfloat16) for _ in range(2))
    y, read_grad = (randn(tokens, width, dtype=torch.bfloat16) for _ in range(2))
    pre, post, residual = randn(tokens, n), randn(tokens, n), randn(tokens, n, n)
    parameters = (randn(n * width, count) * width**-0.5, randn(3), randn(count))
    raw, inverse_rms = randn(count, tokens), randn(tokens)
    rule, grads = MappingRule("sinkhorn", 20, 1e-20), MappingGrads(pre, post, residual)
    projection = Projection(pre, raw, inverse_rms)
    read = ReadOperands(x, *parameters, None)
    both = ReadNeeds(streams=True, phi=True, carry=False)
    merge_read = MergeReadOperands(x, y, residual, post, *parameters, None)
    single_pass = merge_read._replace(carry=pre)
    back = (x, projection, kept_grad, read_grad, grads, rule)
    return {
        "mappings_forward": (n, (read, rule, False)),
        "mappings_backward": (2 * n, (read, projection, None, None, grads, rule, both)),
        "read_forward": (2 * n + 1, (read, rule, True)),
        "read_backward": (4 * n + 2, (read, *back[1:], both)),
        "seam_forward": (3 * n + 2, (merge_read, rule)),
        "seam_backward": (4 * n + 4, (merge_read, *back)),
        "single_pass_forward": (2 * n + 2, (single_pass, rule)),
        "single_pass_backward": (3 * n + 3, (single_pass, *back)),
    }


def _liger(device: str, tokens: int, n: int, width: int) -> dict[str, Callable[[], object]]:
    """Liger's three operations, both directions; backward through autograd, as it is used."""
    connection = LigerConnection(width, n).to(device)
    functional = connection.functional
    x = torch.randn(tokens, n, width, dtype=torch.bfloat16, device=device)
    y = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        pre, post, residual = connection.mappings(x)
    cases: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "aggregate": (functional.liger_mhc_pre, (x, pre)),
        "merge": (functional.liger_mhc_post_res, (x, y, post, residual)),
        "mappings": (lambda x, *_: connection.mappings(x), (x, *connection.parameters())),
    }
    calls: dict[str, Callable[[], object]] = {}
    for name, (function, operands) in cases.items():
        leaves = list(operands)
        for index, tensor in enumerate(operands):
            if not isinstance(tensor, torch.nn.Parameter):
                leaves[index] = tensor.detach().requires_grad_()
        calls[f"{name}_forward"] = _without_grad(function, operands)
        calls[f"{name}_backward"] = _Backward(function, leaves)
    return calls


def _without_grad(function: Callable[..., Any], operands: tuple[Tensor, ...]) -> Callable:
    def forward() -> object:
        with torch.no_grad():
            return function(*operands)

    return forward


class _Backward:
    """Walks a graph back, again and again; the first call makes it."""

    def __init__(self, function: Callable[..., Any], leaves: list[Tensor]) -> None:
        self.function, self.leaves = function, leaves
        self.outputs: tuple[Tensor, ...] = ()

    def __call__(self) -> object:
        if not self.outputs:
            value = self.function(*self.leaves)
            self.outputs = value if isinstance(value, tuple) else (value,)
            self.grads = [torch.randn_like(t) for t in self.outputs]
        return torch.autograd.grad(self.outputs, self.leaves, self.grads, retain_graph=True)
