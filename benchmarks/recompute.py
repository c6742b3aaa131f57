"""Time and memory of a training step by recompute block.

Whole steps of an mHC model of the paper's shape, interleaved in one process. Bytes are those of all
storages that are alive between forward and backward, told by weak references: of the model, and of
its connections alone, around sub-layers that keep nothing.

    python benchmarks/recompute.py --clock cpu --threads 1 > benchmarks/results/recompute_cpu.json

On a machine that is busy with other work, `--clock cpu --threads 1` counts this process's own
processor time.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from live_storages import LiveStorages
from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.composition import compose_experiment
from mhc_lightning.cli.instantiation import build
from mhc_lightning.modules import ManifoldHyperConnection, Transformer
from mhc_lightning.modules.recompute import recomputing
from timing import interleaved_seconds, report


class Opaque(torch.autograd.Function):
    """A sub-layer that keeps nothing."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        """Half of the input."""
        return u * 0.5

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Half of the gradient."""
        return grad * 0.5


def stream_bytes(dim: int, n: int, layers: int, size: int, tokens: int = 256) -> dict[str, float]:
    """Bytes per token that the streams of a pipeline stage keep alive, and Table 3's count."""
    stack = [ManifoldHyperConnection(dim, n, index) for index in range(layers)]
    start = torch.randn(tokens, n, dim, requires_grad=True)
    with LiveStorages(p for layer in stack for p in layer.parameters()) as live:
        flow: Any = start * 1
        with recomputing(size):
            for layer in stack:
                flow = layer.run(flow, Opaque.apply)
            streams, _ = flow.merge()
        del flow
        loss = streams.sum()
        del streams
        kept = (live.bytes() - loss.nbytes) / tokens
    coefficients = 4 * (2 * n * n + 4 * n + 1) * layers
    entries = -(-layers // size) * n if size else (n + 2) * layers
    return {"kept": kept, "by_table_3": 4 * dim * (entries + layers) + coefficients}


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="mhc_50m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter

    experiment = compose_experiment(parse_arguments(["fit", "--config", args.config]))
    model: Transformer = build(experiment, "model")
    tokens = torch.randint(0, model.vocab_size, (args.batch, args.length + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    settings: list[str | int] = ["off", "auto", 1, 2 * len(model.blocks)]
    mixed = args.precision == "bf16-mixed"

    def loss(setting: str | int) -> torch.Tensor:
        model.set_recompute(setting)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return model.loss(tokens[:, :-1], tokens[:, 1:])

    def step_of(setting: str | int) -> Callable[[], None]:
        def step() -> None:
            loss(setting).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    kept = {}
    for setting in settings:
        with LiveStorages([*model.parameters(), *model.buffers()]) as live:
            value = loss(setting)
            kept[str(setting)] = live.bytes()
            del value
    cases = {str(setting): step_of(setting) for setting in settings}
    seconds = interleaved_seconds(cases, args.repeats, warmup=1, clock=clock)
    off = seconds["off"]["median"]
    report(
        "recompute",
        {
            "arguments": vars(args),
            "sub_layers": 2 * len(model.blocks),
            "streams": model.num_streams,
            "auto": model.set_recompute("auto"),
            "bytes_kept": kept,
            "stream_bytes_per_token": {
                str(setting): stream_bytes(
                    model.embedding.embedding_dim,
                    model.num_streams,
                    2 * len(model.blocks),
                    model.set_recompute(setting),
                )
                for setting in settings
            },
            "seconds": {
                name: {key: round(value, 4) for key, value in summary.items()}
                for name, summary in seconds.items()
            },
            "time_over_off": {
                name: round(summary["median"] / off, 4) for name, summary in seconds.items()
            },
            "bytes_over_off": {name: round(size / kept["off"], 4) for name, size in kept.items()},
        },
    )


if __name__ == "__main__":
    main()
