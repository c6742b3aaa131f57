"""One connection, forward and backward, beside other implementations on the same machine.

Ours and transformers' ``DeepseekV4HyperConnection`` compute the same thing (up to epsilons).
``hyper-connections``' mHCv2 does not: it projects each stream by itself; it is here for scale.
The sub-layer is one multiplication by a constant in all of them.

    python benchmarks/connection.py > benchmarks/results/connection_cpu.json
"""

import argparse
from collections.abc import Callable

import torch
from hyper_connections.mHCv2 import ManifoldConstrainedHyperConnections
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from mhc_lightning.modules import ManifoldHyperConnection
from timing import interleaved_seconds, report


class TransformersConnection(nn.Module):
    """Reads, applies the sub-layer and merges as transformers' decoder layer does."""

    def __init__(self, dim: int, num_streams: int) -> None:
        super().__init__()
        config = DeepseekV4Config(hidden_size=dim, hc_mult=num_streams)
        self.mix = DeepseekV4HyperConnection(config)
        nn.init.normal_(self.mix.fn, std=0.02)
        nn.init.zeros_(self.mix.base)
        nn.init.ones_(self.mix.scale)

    def forward(self, streams: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """[..., n, C] -> [..., n, C]."""
        post, comb, collapsed = self.mix(streams)
        output = sublayer(collapsed)
        mixed = torch.matmul(comb.to(streams.dtype).transpose(-1, -2), streams)
        return post.to(streams.dtype).unsqueeze(-1) * output.unsqueeze(-2) + mixed


class HyperConnectionsV2(nn.Module):
    """mHCv2 as its package uses it."""

    def __init__(self, dim: int, num_streams: int) -> None:
        super().__init__()
        self.wrapped = ManifoldConstrainedHyperConnections(num_streams, dim=dim, layer_index=0)

    def forward(self, streams: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """[..., n, C] -> [..., n, C]."""
        u, add_residual = self.wrapped(streams)
        return add_residual(sublayer(u))


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
    args = parser.parse_args()
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
    seconds = interleaved_seconds(steps, args.repeats)

    def ratio(ours: str, theirs: str) -> float:
        return seconds[theirs]["median"] / seconds[ours]["median"]

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
        },
    )


if __name__ == "__main__":
    main()
