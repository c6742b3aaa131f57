"""Part `training`: what mHC costs a training step, over the same model without it.

The paper's 3B model, 4,096 tokens per sequence, bf16-mixed, AdamW, one GPU. One model is in memory
at a time; the baseline is measured first and last, so that a drift of the clocks shows.
"""

from functools import partial
from typing import Any, NamedTuple

import torch

from gpu_bench import Bench, attempt, release_memory
from gpu_results import Results
from members import Member, experiment_of
from mhc_lightning.cli.instantiation import build
from mhc_lightning.planning import DataParallel, ShapesOnly, this_machine
from mhc_lightning.planning.activations import MicroBatch, sub_layers
from mhc_lightning.planning.memory import device_memory
from mhc_lightning.planning.precision import precision_of
from timing import interleaved_seconds, kernels

# Tiny, for the interpreter.
TOY = (
    *("model.dim=32", "model.num_layers=1", "model.num_heads=2", "model.head_dim=16"),
    *("model.rope_dim=8", "model.kv_rank=16", "model.ffn_dim=16", "model.num_experts=2"),
    *("model.num_active_experts=1", "model.vocab_size=64", "model.num_streams=2"),
    *("data.sequence_length=8", "data.batch_size=1", "data.micro_batch_size=1"),
)
_SHARE_OF_MEMORY = 0.88  # that the prediction may take


class Variant(NamedTuple):
    """A model and how it runs."""

    name: str
    kernels: str
    overrides: tuple[str, ...] = ()


def variants(size: str) -> list[Variant]:
    """In the order of their measurement; the first is what the others are compared with."""
    baseline, mhc = f"baseline_{size}", f"mhc_{size}"
    single = ("connection=mhc_single_pass",)
    return [
        Variant(baseline, "torch", ("compile=true",)),
        Variant(mhc, "triton", ("compile=true",)),
        Variant(mhc, "triton", ("compile=true", *single)),
        Variant(f"hc_{size}", "triton", ("compile=true",)),
        Variant(mhc, "torch", ("compile=true",)),
        Variant(baseline, "torch"),
        Variant(mhc, "triton"),
        Variant(baseline, "torch", ("compile=true", "seed=1")),
    ]


def measure_training(bench: Bench, results: Results, size: str, sequences: int | None) -> None:
    """Fill ``results``.

    Args:
        bench: The device.
        results: Where the rows go.
        size: Of the family member.
        sequences: Per step; by default as many as are predicted to fit with mHC on plain torch.
    """
    batch = sequences or _sequences_that_fit(bench, size)
    for variant in variants(size)[: 2 if bench.toy else None]:
        key = {
            "model": variant.name,
            "kernels": variant.kernels,
            "overrides": " ".join(variant.overrides),
        }
        if results.wants(**key):
            found = attempt(partial(_measure, bench, variant, batch))
            results.add(**key, sequences=batch, **found)
            release_memory()


def _overrides(bench: Bench, variant: Variant) -> tuple[str, ...]:
    return (*TOY, "compile=false") if bench.toy else variant.overrides


def _sequences_that_fit(bench: Bench, size: str) -> int:
    if bench.toy:
        return 1
    experiment = experiment_of(f"mhc_{size}")
    with ShapesOnly():
        model = build(experiment, "model")
    state = build(experiment, "optimizer").state_per_value
    length = experiment.values()["data"]["sequence_length"]
    free, _ = torch.cuda.mem_get_info()
    batch = 16
    while batch > 1:
        micro_batch = MicroBatch(batch, length, precision_of("bf16-mixed"), True)
        if (
            device_memory(model, micro_batch, DataParallel(), state).total
            <= _SHARE_OF_MEMORY * free
        ):
            break
        batch //= 2
    return batch


def _measure(bench: Bench, variant: Variant, sequences: int) -> dict[str, Any]:
    torch._dynamo.reset()
    with kernels(variant.kernels):
        experiment = experiment_of(variant.name, *_overrides(bench, variant))
        return _timed(bench, Member(experiment, bench.device, drawn=bench.toy), sequences)


def _timed(bench: Bench, member: Member, sequences: int) -> dict[str, Any]:
    tokens = member.batch(sequences)

    def step() -> None:
        member.step(tokens)
        if not bench.toy:
            torch.cuda.synchronize()

    model = member.model
    found: dict[str, Any] = {
        "tokens": sequences * member.length,
        "sub_layers": len(sub_layers(model)),
        "flops_per_token": model.flops_per_token(member.length),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if bench.toy:
        step()
        return {**found, "seconds": None}
    torch.cuda.reset_peak_memory_stats()
    seconds = interleaved_seconds({"step": step}, repeats=10, warmup=3)["step"]
    kind = this_machine(1, torch.device("cuda")).kind
    flops = found["flops_per_token"] * found["tokens"] / seconds["median"]
    return {
        **found,
        "seconds": seconds,
        "tokens_per_second": found["tokens"] / seconds["median"],
        "mfu": flops / kind.low_flops,
        "peak_flops_taken": kind.low_flops,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
