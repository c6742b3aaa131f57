"""A training step with mHC over the same model with the plain residual connection.

Same sub-layers, flags and allocator, interleaved in one process; six blocks, 8 x 256 tokens, n = 4;
on the torch path, and on the compiled kernels (`mhc/kernels`).

    python benchmarks/training_step.py > benchmarks/results/training_step_cpu.json
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from mhc_lightning.modules import (
    Connection,
    HyperConnection,
    ManifoldHyperConnection,
    ResidualConnection,
    Transformer,
)
from mhc_lightning.optimizers.recipes import AdamWRecipe
from timing import interleaved_seconds, kernels, report

CONNECTIONS: dict[str, Callable[..., Connection]] = {
    "residual": ResidualConnection,
    "hc": HyperConnection,
    "mhc": ManifoldHyperConnection,
}

MODES = ("eager", "compiled")


def make_step(
    connection: Callable[..., Connection],
    dim: int,
    compiled: bool,
    choice: str,
    args: argparse.Namespace,
) -> Callable[[], None]:
    torch.manual_seed(0)
    model = Transformer(
        connection=connection,
        vocab_size=257,
        dim=dim,
        num_layers=args.blocks,
        num_heads=dim // 64,
        ffn_dim=8 * dim // 3 // 32 * 32,
        head_dim=64,
        rope_dim=32,
        kv_rank=dim // 2,
        init_std=0.02,
    )
    if compiled:
        model.compile_sublayers()
    optimizer, _ = AdamWRecipe(lr=1e-4).build(model, total_steps=1)
    tokens = torch.randint(0, 257, (args.batch, args.length + 1))

    def step() -> None:
        with kernels(choice):
            logits = model(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["perf_counter", "process_time"], default="perf_counter")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    rows = []
    for dim in args.dims:
        for mode in args.modes:
            compiled = mode == "compiled"
            steps = {
                name: make_step(connection, dim, compiled, "torch", args)
                for name, connection in CONNECTIONS.items()
            }
            for name in ("hc", "mhc"):
                step = make_step(CONNECTIONS[name], dim, compiled, "compiled", args)
                steps[f"{name}/kernels"] = step
            seconds = interleaved_seconds(steps, args.repeats, clock=getattr(time, args.clock))
            baseline = seconds["residual"]["median"]
            rows.append(
                {
                    "dim": dim,
                    "compiled": compiled,
                    "milliseconds": {
                        name: round(1e3 * summary["median"], 2) for name, summary in seconds.items()
                    },
                    "ratio_to_residual": {
                        name: round(summary["median"] / baseline, 3)
                        for name, summary in seconds.items()
                    },
                }
            )
    report("training_step", {"arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
