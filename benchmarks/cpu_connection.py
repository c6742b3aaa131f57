"""One mHC connection on a CPU, forward and backward, over a plain copy of the bytes it moves.

The sub-layer is the identity. By parts a connection reads or writes (9n + 5)·C elements per token
of streams and outputs: n + 1 to read, 2n + 1 to merge, 3n + 2 and 3n + 1 on the way back. The copy
reads half of these bytes and writes as many, to memory that is there already. Cases take turns in
one process.

    python benchmarks/cpu_connection.py > benchmarks/results/connection_kernels_cpu.json
"""

import argparse
import time
from collections.abc import Callable

import torch

from mhc_lightning.modules import ManifoldHyperConnection
from timing import interleaved_seconds, kernels, report

# (n, C)
SHAPES = ((4, 128), (4, 256), (4, 512), (4, 1024), (1, 512), (2, 512), (8, 512))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cases(n: int, width: int, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The copy, and the connection on each set of kernels."""
    torch.manual_seed(0)
    connection = ManifoldHyperConnection(width, n, 0)
    with torch.no_grad():
        connection.alpha.fill_(0.5)
        connection.phi.normal_(std=0.02)
    streams = torch.randn(tokens, n, width).to(dtype).requires_grad_()
    gradient = torch.randn(tokens, n, width).to(dtype)
    source = torch.randn(tokens * (9 * n + 5) * width // 2).to(dtype)
    copied = torch.empty_like(source)

    def step_on(choice: str) -> Callable[[], None]:
        def step() -> None:
            with kernels(choice):
                connection(streams, lambda x: x).backward(gradient)
            streams.grad = None
            connection.zero_grad()

        return step

    return {
        "copy": lambda: copied.copy_(source),
        **{choice: step_on(choice) for choice in ("compiled", "torch")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--clock", choices=["perf_counter", "process_time"], default="perf_counter")
    args = parser.parse_args()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in args.dtypes:
            for n, width in SHAPES:
                steps = cases(n, width, args.tokens, DTYPES[dtype])
                seconds = interleaved_seconds(steps, args.repeats, clock=getattr(time, args.clock))
                medians = {name: summary["median"] for name, summary in seconds.items()}
                rows.append(
                    {
                        "threads": threads,
                        "dtype": dtype,
                        "n": n,
                        "width": width,
                        "milliseconds": {k: round(1e3 * v, 3) for k, v in medians.items()},
                        "over_copy": {
                            k: round(v / medians["copy"], 2)
                            for k, v in medians.items()
                            if k != "copy"
                        },
                    }
                )
    report("cpu_connection", {"arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
