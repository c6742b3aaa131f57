"""One connection, forward and backward, beside other implementations on the same machine.

Ours and transformers' ``DeepseekV4HyperConnection`` compute the same thing (up to epsilons).
``hyper-connections``' mHCv2 does not: it projects each stream by itself; it is here for scale.
The sub-layer is one multiplication by a constant in all of them.

    python benchmarks/connection.py > benchmarks/results/connection_cpu.json
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mhc_lightning.modules import ManifoldHyperConnection
from peers import HyperConnectionsV2, TransformersConnection
from timing import interleaved_seconds, report


def scale(x: Tensor) -> Tensor:
    return x * 1.01


def peak_bytes(step: Callable[[], None]) -> int:
    """Peak of the bytes that one forward and backward pass has allocated on the CPU."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["perf_counter", "process_time"], default="perf_counter")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    modules = {
        "mhc_lightning": ManifoldHyperConnection(args.dim, args.streams, 0),
        "transformers": TransformersConnection(args.dim, args.streams),
        "hyper_connections_mhcv2": HyperConnectionsV2(args.dim, args.streams),
    }

    def step_of(module: nn.Module, call: Callable[..., Tensor]) -> Callable[[], None]:
        shape = (args.batch, args.length, args.streams, args.dim)
        streams = torch.randn(shape, requires_grad=True)
        weights = torch.randn(shape)

        def step() -> None:
            call(streams, scale).backward(weights)
            streams.grad = None
            module.zero_grad()

        return step

    steps = {f"{name}/eager": step_of(module, module) for name, module in modules.items()}
    memory = {name: peak_bytes(step) for name, step in steps.items()}
    for name in ("mhc_lightning", "transformers"):
        steps[f"{name}/compiled"] = step_of(modules[name], torch.compile(modules[name]))
    seconds = interleaved_seconds(steps, args.repeats, clock=getattr(time, args.clock))

    def ratio(ours: str, theirs: str) -> float:
        return round(seconds[theirs]["median"] / seconds[ours]["median"], 2)

    report(
        "connection",
        {
            "arguments": vars(args),
            "milliseconds": {
                name: {key: round(1e3 * value, 3) for key, value in summary.items()}
                for name, summary in seconds.items()
            },
            "peak_megabytes": {name: round(value / 2**20, 1) for name, value in memory.items()},
            "speed_over_transformers": {
                "eager": ratio("mhc_lightning/eager", "transformers/eager"),
                "compiled": ratio("mhc_lightning/compiled", "transformers/compiled"),
                "ours_eager_over_theirs_compiled": ratio(
                    "mhc_lightning/eager", "transformers/compiled"
                ),
            },
            "speed_over_hyper_connections": {
                "eager": ratio("mhc_lightning/eager", "hyper_connections_mhcv2/eager"),
            },
        },
    )


if __name__ == "__main__":
    main()
