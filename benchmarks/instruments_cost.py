"""The cost of the instruments: seconds per sample, and their share of training time.

Trains the language model of `training_step.py` (six blocks, 8 x 256 tokens, n = 4), sampling every
second step, so that sampled and plain steps alternate in one process. Two measures of the same:
`seconds` adds up the time spent in the callbacks' own code (their hooks, the forward hooks of the
modules they watch, drawing and writing to TensorBoard); `difference` is the median sampled step
less the median plain step, which is noisier but misses nothing. Shares are for the trainer's
log_every_n_steps given by --interval, pictures at their own, longer default.

    python benchmarks/instruments_cost.py > benchmarks/results/instruments_cost_cpu.json

On a machine that is busy with other work, `--clock cpu --threads 1` counts this process's own
processor time instead of time on the wall.
"""

import argparse
import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.callbacks import AmaxGain, StreamDiversity, StreamMatrixHeatmap, StreamSampler
from mhc_lightning.modules import ManifoldHyperConnection, Transformer
from mhc_lightning.optimizers.recipes import AdamWRecipe
from timing import report

PICTURE_INTERVALS = 50  # pictures' default interval, in units of log_every_n_steps
clock = time.perf_counter
HOOKS = ("on_train_batch_start", "on_before_backward", "on_train_batch_end")
INSTRUMENTS: dict[str, tuple[Callable[[], StreamSampler[Any]], int]] = {
    # name: (how to make one that samples every second step, default interval in logging intervals)
    "amax_gain": (lambda: AmaxGain(2, profile_every_n_steps=10**9), 1),
    "stream_diversity": (lambda: StreamDiversity(2), 1),
    "amax_gain_with_profile": (lambda: AmaxGain(2, profile_every_n_steps=2), PICTURE_INTERVALS),
    "stream_matrices": (lambda: StreamMatrixHeatmap(every_n_steps=2), PICTURE_INTERVALS),
}


class StepTimes(pl.Callback):
    """Notes when a step begins or ends; one goes before the instrument, one behind it."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin a step."""
        self.starts.append(clock())

    def on_train_batch_end(self, *_: Any) -> None:
        """End it."""
        self.ends.append(clock())


def count_own_time(callback: StreamSampler[Any], spent: list[float]) -> None:
    """Add the seconds of each of the callback's own calls to the last entry of ``spent``."""

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return call(*args, **kwargs)
            finally:
                spent[-1] += clock() - start

        return wrapper

    for name in HOOKS:
        setattr(callback, name, timed(getattr(callback, name)))
    callback._watcher._see = timed(callback._watcher._see)  # type: ignore[method-assign]


def make_model(args: argparse.Namespace, dim: int) -> LanguageModel:
    torch.manual_seed(0)
    network = Transformer(
        connection=ManifoldHyperConnection,
        vocab_size=257,
        dim=dim,
        num_layers=args.blocks,
        num_heads=max(1, dim // 64),
        ffn_dim=8 * dim // 3 // 32 * 32,
        head_dim=64,
        rope_dim=32,
        kv_rank=dim // 2,
        init_std=0.02,
    )
    return LanguageModel(network, AdamWRecipe(lr=1e-4, warmup_steps=1), compile=args.compile)


def measure(name: str, model: LanguageModel, args: argparse.Namespace) -> dict[str, float]:
    make, intervals = INSTRUMENTS[name]
    first, last, instrument = StepTimes(), StepTimes(), make()
    spent: list[float] = []
    count_own_time(instrument, spent)

    class NewStep(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            spent.append(0.0)

    tokens: Any = torch.randint(
        0, 257, (2 * args.samples * args.batch + args.batch, args.length + 1)
    )
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            max_steps=2 * args.samples,
            max_epochs=-1,
            accelerator="cpu",
            devices=1,
            callbacks=[NewStep(), first, instrument, last],
            logger=TensorBoardLogger(folder),
            log_every_n_steps=args.interval,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, DataLoader(tokens, batch_size=args.batch))
    steps = [end - start for start, end in zip(first.starts, last.ends, strict=True)]
    warm = 2  # the first plain and the first sampled step import and allocate
    plain = statistics.median(steps[warm::2])
    sampled = statistics.median(steps[warm + 1 :: 2])
    seconds = statistics.median(spent[warm + 1 :: 2])
    idle = statistics.median(spent[warm::2])
    every = args.interval * intervals
    return {
        "seconds_per_sample": seconds,
        "difference_of_medians": sampled - plain,
        "seconds_per_plain_step": idle,
        "step_seconds": plain,
        "default_interval": every,
        "share": (seconds + (every - 1) * idle) / (every * plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8, help="sampled steps per instrument")
    parser.add_argument("--interval", type=int, default=10, help="trainer.log_every_n_steps")
    parser.add_argument("--compile", action="store_true", help="compile the sub-layers")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    global clock
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")

    rows = []
    for dim in args.dims:
        model = make_model(args, dim)
        costs = {name: measure(name, model, args) for name in INSTRUMENTS}
        # A picture of the profile comes on top of the gains that are logged anyway.
        gain, drawn = costs["amax_gain"], costs["amax_gain_with_profile"]
        picture = drawn["seconds_per_sample"] - gain["seconds_per_sample"]
        profile = picture / (drawn["default_interval"] * drawn["step_seconds"])
        scalars = gain["share"] + costs["stream_diversity"]["share"]
        rows.append(
            {
                "dim": dim,
                "instruments": costs,
                "share_scalars": scalars,
                "share_all": scalars + profile + costs["stream_matrices"]["share"],
            }
        )
    report("instruments_cost", {"arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
