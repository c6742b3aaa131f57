"""Bytes that each kernel, and a whole connection, moves per token, beside the least it has to move.

Counted in Triton's interpreter on the CPU (see `traffic_counter.py`), so it takes a while:

    TRITON_INTERPRET=1 python benchmarks/kernel_traffic.py --tokens 4096 --width 1280

The ideal counts every stream-sized operand once, in the streams' dtype, and nothing else.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from mhc_lightning.kernels.aggregate.triton import (
    aggregate_backward_config,
    aggregate_forward_config,
)
from mhc_lightning.kernels.backend import MOST_FUSED_STREAMS
from mhc_lightning.kernels.context_gate.triton import gate_backward_config, gate_forward_config
from mhc_lightning.kernels.gated_write.triton import write_backward_config, write_forward_config
from mhc_lightning.kernels.merge.triton import merge_backward_config, merge_forward_config
from mhc_lightning.kernels.merge_read.triton.merge_project import merge_project_config
from mhc_lightning.kernels.merge_read.triton.merge_project_backward import (
    merge_project_backward_config,
)
from mhc_lightning.kernels.read.triton.project_backward import project_backward_config
from mhc_lightning.kernels.replay.triton import replay_forward_config
from mhc_lightning.kernels.triton_support.block_sizes import choose
from mhc_lightning.kernels.triton_support.workloads import workloads
from mhc_lightning.modules import ManifoldHyperConnection
from traffic_counter import TrafficCounter


def least_of_a_connection(n: int) -> int:
    """The fewest elements per token, in units of C, that separate kernels have to move in total.

    Forward: project (n), aggregate (n + 1), merge (2n + 1). Backward: project (2n), aggregate
    (2n + 1), merge (3n + 2). The sum of the streams' gradients is not in it.
    """
    return 11 * n + 5


@dataclass
class Moved:
    """The bytes per token that one piece of work moved.

    Attributes:
        name: Of the work.
        ideal: The least it has to move of stream-sized tensors; 0 if it touches none.
        streams: What it moved of stream-sized tensors.
        other: Of coefficients, parameters and partial sums, each element once per launch.
        repeated: Further accesses to those.
        launches: Kernels launched.
        table: Every operand.
    """

    name: str
    ideal: int
    streams: float
    other: float
    repeated: float
    launches: int
    table: str

    @property
    def ratio(self) -> float:
        """The ratio of counted bytes to the ideal."""
        return (self.streams + self.other) / self.ideal if self.ideal else float("nan")


def kernel_traffic(
    names: Iterable[str], tokens: int, n: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Moved]:
    """Run kernels once each and count.

    Args:
        names: Names of workloads.
        tokens: Number of tokens.
        n: Number of streams.
        width: C.
        dtype: Dtype of the streams.
    """
    work = workloads(tokens, n, width, dtype)
    for name in names:
        ideal = work[name].elements * width * dtype.itemsize
        yield _count(name, ideal, tokens, width, work[name].run)


def connection_traffic(
    tokens: int, n: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> Moved:
    """Count a whole connection, forward and backward, without its sub-layer.

    Everything that runs counts: gradients that are added up, casts and copies of torch as well.
    """
    ideal = least_of_a_connection(n) * width * dtype.itemsize
    run = _chain(1, tokens, n, width, dtype)
    return _count("connection", ideal, tokens, width, run)


def fused_connection_traffic(
    tokens: int, n: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> Moved:
    """Count a connection between two fused seams: what a chain of three moves more than of two.

    The least is 3n + 2 elements forward and 4n + 4 backward.
    """
    ideal = (7 * n + 6) * width * dtype.itemsize
    two, three = (
        _count("fused connection", ideal, tokens, width, _chain(k, tokens, n, width, dtype))
        for k in (2, 3)
    )
    return replace(
        three,
        streams=three.streams - two.streams,
        other=three.other - two.other,
        repeated=three.repeated - two.repeated,
        launches=three.launches - two.launches,
    )


def _chain(
    length: int, tokens: int, n: int, width: int, dtype: torch.dtype
) -> Callable[[], object]:
    """Runs some connections one after the other, forward and backward."""
    chain = [ManifoldHyperConnection(width, n, k) for k in range(length)]
    streams = torch.randn(tokens, n, width).to(dtype).requires_grad_()
    grad = torch.randn(tokens, n, width).to(dtype)
    output, read_grad = (torch.randn(tokens, width).to(dtype) for _ in range(2))

    class Sublayer(torch.autograd.Function):
        """Moves nothing: output and gradient are there already."""

        @staticmethod
        def forward(ctx, u):
            return output

        @staticmethod
        def backward(ctx, grad):
            return read_grad

    def run() -> None:
        flow: Any = streams
        for connection in chain:
            flow = connection.run(flow, Sublayer.apply)
        merged, _ = flow.merge()
        parameters = [p for connection in chain for p in connection.parameters()]
        torch.autograd.grad(merged, [streams, *parameters], grad)

    return run


def _count(name: str, ideal: int, tokens: int, width: int, run: Callable[[], object]) -> Moved:
    with TrafficCounter(tokens, width) as counter:
        run()
    moved = (counter.stream_bytes, counter.other_bytes, counter.repeated_bytes)
    return Moved(name, ideal, *moved, counter.launches, counter.table())


@contextmanager
def many_tokens_per_program(n: int, width: int, itemsize: int) -> Iterator[None]:
    """Default blocks but for their tokens: faster to interpret, and the streams move the same."""
    defaults = {
        **dict.fromkeys(
            ("aggregate_forward", "mean_forward", "expand_backward"), aggregate_forward_config
        ),
        **dict.fromkeys(
            ("aggregate_backward", "aggregate_backward_of_pre"), aggregate_backward_config
        ),
        "merge_forward": merge_forward_config,
        "merge_backward": merge_backward_config,
        "replay_forward": replay_forward_config,
        "context_gate_forward": gate_forward_config,
        "context_gate_backward": gate_backward_config,
    }
    for end in ("", "_convolved"):
        defaults[f"gated_write_forward{end}"] = write_forward_config
        defaults[f"gated_write_backward{end}"] = write_backward_config
    for end in ("", "_per_stream"):
        defaults[f"project_backward{end}"] = project_backward_config
    for end in ("", "_single_pass"):
        defaults[f"merge_project{end}"] = merge_project_config
        defaults[f"merge_project_backward{end}"] = merge_project_backward_config
    with ExitStack() as stack:
        for kernel, default in defaults.items():
            config = default(n, width, itemsize)._replace(block_tokens=512)
            stack.enter_context(choose(kernel, config))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--operands", action="store_true", help="every operand of every kernel")
    args = parser.parse_args()
    os.environ["MHC_LIGHTNING_KERNELS"] = "triton"

    def all_of_them() -> Iterator[Moved]:
        every = workloads(1, args.streams, 16, torch.bfloat16)
        names = [name for name in every if args.only in name]
        yield from kernel_traffic(names, args.tokens, args.streams, args.width)
        if args.only in "connection":
            yield connection_traffic(args.tokens, args.streams, args.width)
        if args.only in "fused connection" and args.streams <= MOST_FUSED_STREAMS:
            yield fused_connection_traffic(args.tokens, args.streams, args.width)

    print("| bytes per token | launches | ideal | streams | ratio | coefficients | repeated |")
    print("|---|---|---|---|---|---|---|")
    with many_tokens_per_program(args.streams, args.width, 2):
        for moved in all_of_them():
            ratio = f"{moved.ratio:.3f}" if moved.ideal else ""
            numbers = f"{moved.ideal:,} | {moved.streams:,.0f} | {ratio}"
            numbers += f" | {moved.other:,.0f} | {moved.repeated:,.0f}"
            print(f"| {moved.name} | {moved.launches} | {numbers} |", flush=True)
            if args.operands:
                print(f"\n{moved.table}\n")


if __name__ == "__main__":
    main()
