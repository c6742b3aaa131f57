"""Part `memory`: what `plan` predicts of a device's memory, against what a GPU allocates.

None of the configurations was used to make the prediction, which is read off the code.
"""

from functools import partial
from typing import Any

import torch

from gpu_bench import Bench, attempt, release_memory
from gpu_results import Results
from gpu_training import TOY
from members import Member, experiment_of
from mhc_lightning.planning import DataParallel
from mhc_lightning.planning.activations import MicroBatch
from mhc_lightning.planning.memory import device_memory
from mhc_lightning.planning.precision import precision_of
from timing import kernels

# Experiment, overrides, sequences, micro-batches.
CASES: list[tuple[str, tuple[str, ...], int, int]] = [
    ("baseline_150m", (), 4, 1),
    ("mhc_150m", (), 4, 2),
    ("hc_150m", (), 2, 1),
    ("mhc_150m", ("trainer.precision=32-true",), 2, 1),
    ("mhc_150m", ("trainer.precision=bf16-true", "model.num_streams=2"), 4, 1),
    ("baseline_500m", (), 4, 2),
    ("mhc_500m", (), 4, 1),
    ("mhc_50m", ("model.num_streams=8", "data.sequence_length=8192"), 4, 1),
]


def measure_memory(bench: Bench, results: Results) -> None:
    """Fill ``results``."""
    for choice in ("triton", "torch"):
        for name, overrides, sequences, micro_batches in CASES[: 1 if bench.toy else None]:
            key = {
                "model": name,
                "overrides": " ".join(overrides),
                "sequences": sequences,
                "micro_batches": micro_batches,
                "kernels": choice,
            }
            if results.wants(**key):
                given = overrides if not bench.toy else TOY
                with kernels(choice):
                    found = attempt(partial(_measure, bench, name, given, sequences, micro_batches))
                results.add(**key, **found)
                release_memory()


def _measure(
    bench: Bench, name: str, overrides: tuple[str, ...], sequences: int, micro_batches: int
) -> dict[str, Any]:
    if not bench.toy:
        torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")  # loads the library
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    member = Member(experiment_of(name, *overrides), bench.device, drawn=bench.toy)
    batch = MicroBatch(sequences, member.length, precision_of(member.precision), not bench.toy)
    memory = device_memory(member.model, batch, DataParallel(), member.recipe.state_per_value)
    predicted = memory.total
    tokens = member.batch(sequences)
    for _ in range(2):  # the second finds gradients and the optimizer's state
        member.step(*[tokens] * micro_batches)
    found: dict[str, Any] = {"predicted_bytes": predicted, "measured_bytes": None}
    if not bench.toy:
        found["measured_bytes"] = torch.cuda.max_memory_allocated() - before
        found["predicted_over_measured"] = predicted / found["measured_bytes"]
    return found
