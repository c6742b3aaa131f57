"""Training steps with Engram beside steps without, by rows of its tables, and other ways beside it.

All cases of a comparison take turns in one process with one thread. The clock counts this
process's time on the CPU, so that other work on the machine costs caches and no waiting.

    python benchmarks/memory_step.py > benchmarks/results/memory_step_cpu.json
"""

import argparse
import itertools
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engram_peers import DemoEngram, DeviceEngram
from mhc_lightning.modules import Engram, ManifoldHyperConnection, Memory, Transformer
from mhc_lightning.modules.memory.engram import EngramBlock
from mhc_lightning.modules.memory.row_store import RowStore
from mhc_lightning.modules.memory.table import NgramTable
from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.strategies.row_stores import finish_row_gradients
from timing import interleaved_seconds, kernels, report

BLOCKS, VOCABULARY = 6, 257


def network(memory: Callable[..., Memory], dim: int) -> Transformer:
    """A network whose tables are zero pages that nothing has touched yet."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(
            connection=ManifoldHyperConnection,
            vocab_size=VOCABULARY,
            dim=dim,
            num_layers=BLOCKS,
            num_heads=dim // 64,
            ffn_dim=8 * dim // 3 // 32 * 32,
            head_dim=64,
            rope_dim=32,
            kv_rank=dim // 2,
            init_std=0.02,
            memory=memory,
        )
    model.to_empty(device="cpu")
    for module in model.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None and not isinstance(module, Transformer | NgramTable):
            reset()
    for module in model.modules():
        if isinstance(module, NgramTable):
            module.weight = nn.Parameter(torch.zeros(module.num_rows, module.width))
            module.store = RowStore(module.weight)
    return model


def make_step(model: Transformer, args: argparse.Namespace) -> Callable[[], None]:
    """A step of AdamW, of row gradients where there are tables; four batches take turns."""
    optimizer, _ = AdamWRecipe(lr=1e-4).build(model, total_steps=1)
    batches = itertools.cycle(
        torch.randint(0, VOCABULARY, (4, args.batch, args.length + 1)).unbind()
    )

    def step() -> None:
        tokens = next(batches)
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        finish_row_gradients(model)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(
    cases: Mapping[str, Callable[[], object]], baseline: str, repeats: int
) -> dict[str, Any]:
    """Milliseconds of processor time, their ratios to one case, and the spread of them."""
    seconds = interleaved_seconds(cases, repeats, warmup=5, clock=time.process_time)
    middle = seconds[baseline]["median"]
    return {
        "milliseconds": {name: round(1e3 * s["median"], 2) for name, s in seconds.items()},
        "quartiles": {
            name: [round(1e3 * s[key], 2) for key in ("quartile_1", "quartile_3")]
            for name, s in seconds.items()
        },
        f"ratio_to_{baseline}": {n: round(s["median"] / middle, 3) for n, s in seconds.items()},
    }


def steps_with_and_without(args: argparse.Namespace) -> list[dict[str, Any]]:
    """On the kernels that a CPU takes by itself, and in plain torch."""
    rows = []
    for choice, dim in itertools.product(("compiled", "torch"), args.dims):
        memories: dict[str, Callable[..., Memory]] = {
            "none": Memory,
            "engram": partial(Engram, rows=args.rows),
            "engram_without_convolution": partial(Engram, rows=args.rows, conv=False),
        }
        models = {name: network(memory, dim) for name, memory in memories.items()}
        cases = {name: make_step(model, args) for name, model in models.items()}
        flops = {name: model.flops_per_token(args.length) for name, model in models.items()}
        with kernels(choice):
            times = compare(cases, "none", args.repeats)
        rows.append(
            {
                "kernels": choice,
                "dim": dim,
                "flops_per_token": flops,
                "flops_ratio": round(flops["engram"] / flops["none"], 4),
                **times,
            }
        )
    return rows


def steps_by_rows(args: argparse.Namespace) -> dict[str, Any]:
    """One block with memory; the table of 10⁸ rows of 8 values is 3.2 GB, most of it untouched."""
    cases = {}
    for exponent in args.exponents:
        rows = max(10**exponent // 16, 64)
        memory = partial(Engram, rows=rows, layers=[1], num_heads=8)
        cases[f"1e{exponent}"] = make_step(network(memory, args.dim), args)
    return {"dim": args.dim, **compare(cases, next(iter(cases)), args.repeats)}


def ways(args: argparse.Namespace, update: bool) -> dict[str, Any]:
    """Forward and backward of one module from tokens on, with AdamW's update behind it or not."""
    memory = Engram(
        vocab_size=VOCABULARY,
        model_dim=args.dim,
        num_layers=BLOCKS,
        num_streams=4,
        rows=args.rows,
        layers=[1],
        bias=True,
    )
    ours = memory.block_memory(1)
    assert isinstance(ours, EngramBlock) and memory.hash is not None
    for parameter in ours.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    ours.table.store = RowStore(ours.table.weight)
    multipliers = memory.hash.multipliers[0].numpy()
    sizes = (memory.hash.layout, multipliers, 0, args.dim, 4, ours.table.width)
    shape = (args.batch, args.length, 4, args.dim)
    streams, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    tokens = torch.randint(0, VOCABULARY, shape[:2])

    def make(module: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            module(streams, memory.recall(tokens) if module is ours else tokens).backward(grad)
            if update:
                finish_row_gradients(module)
                optimizer.step()
            optimizer.zero_grad()
            streams.grad = None

        return step

    recipe = AdamWRecipe(lr=1e-4)
    cases = {"package": make(ours, recipe.build(ours, total_steps=1)[0])}
    for name, kind in {"as_the_demo": DemoEngram, "as_megatron": DeviceEngram}.items():
        module = kind(*sizes)
        cases[name] = make(module, torch.optim.AdamW(module.parameters(), lr=1e-4))
    table = {"dim": args.dim, "table_rows": ours.table.num_rows, "update": update}
    return table | compare(cases, "package", args.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--dim", type=int, default=256, help="of the other two comparisons")
    parser.add_argument("--rows", type=int, default=16384, help="least rows of a head")
    parser.add_argument("--exponents", type=int, nargs="+", default=[4, 5, 6, 7, 8])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "ways": [ways(args, update) for update in (False, True)],
        "with_and_without": steps_with_and_without(args),
        "by_rows": steps_by_rows(args),
    }
    report("memory_step", {"arguments": vars(args), "clock": "process_time", **results})


if __name__ == "__main__":
    main()
