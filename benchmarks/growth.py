r"""How the cost of a training step, a checkpoint and an instrument grows with its sizes.

One thing grows at a time, by doubling, from the same small model: C = 128, n = 4, four blocks,
2 x 128 tokens. Steps with mHC and with the residual connection run in turn in one process, on one
thread; medians of processor time. A checkpoint is Lightning's, with AdamW's state. It takes less
than two minutes.

    python benchmarks/growth.py --picture benchmarks/results/growth_cpu.png \
        > benchmarks/results/growth_cpu.json

`growth` of a curve is the power of its last doubling: 1 where twice as much takes twice as long.
"""

import argparse
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

import instruments_cost
from mhc_lightning.modules import ManifoldHyperConnection, ResidualConnection, Transformer
from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.plotting.theme import RUN_COLOURS, style_axes
from timing import interleaved_seconds, report

BASE = {"dim": 128, "streams": 4, "blocks": 4, "sequences": 2, "length": 128}
CURVES: dict[str, tuple[str, list[dict[str, int]]]] = {
    # name: (what grows, the settings that differ from BASE)
    "width": ("dim", [{"dim": dim} for dim in (64, 128, 256, 512)]),
    "streams": ("streams", [{"streams": n} for n in (1, 2, 4, 8)]),
    "blocks": ("blocks", [{"blocks": blocks} for blocks in (2, 4, 8, 16)]),
    "tokens": ("sequences", [{"sequences": count} for count in (1, 2, 4, 8)]),
    "sequence length, 2,048 tokens": (
        "length",
        [{"length": length, "sequences": 2048 // length} for length in (128, 256, 512, 1024, 2048)],
    ),
}
CONNECTIONS = {"residual": ResidualConnection, "mhc": ManifoldHyperConnection}
REPEATS = 5


def step_of(connection: Any, **changed: int) -> Callable[[], None]:
    """A training step of the small model with some settings changed."""
    settings = SimpleNamespace(**BASE | changed)
    dim = settings.dim
    torch.manual_seed(0)
    model = Transformer(
        connection=connection,
        num_streams=1 if connection is ResidualConnection else settings.streams,
        vocab_size=257,
        dim=dim,
        num_layers=settings.blocks,
        num_heads=max(1, dim // 64),
        ffn_dim=8 * dim // 3 // 32 * 32,
        head_dim=64,
        rope_dim=32,
        kv_rank=dim // 2,
        init_std=0.02,
    )
    optimizer, _ = AdamWRecipe(lr=1e-4).build(model, total_steps=1)
    tokens = torch.randint(0, 257, (settings.sequences, settings.length + 1))

    def step() -> None:
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_curve(name: str) -> list[dict[str, float]]:
    """Milliseconds of a step of both models for every point of a curve."""
    what, points = CURVES[name]
    rows = []
    for changed in points:
        steps = {kind: step_of(connection, **changed) for kind, connection in CONNECTIONS.items()}
        seconds = interleaved_seconds(steps, REPEATS, warmup=1, clock=time.process_time)
        times = {kind: round(1e3 * summary["median"], 2) for kind, summary in seconds.items()}
        rows.append({what: changed[what], **times})
    return rows


def model_of(**changed: int) -> Any:
    """The LightningModule of the small model with mHC."""
    settings = BASE | changed
    args = argparse.Namespace(blocks=settings["blocks"], compile=False)
    return instruments_cost.make_model(args, settings["dim"])


def instrument_curve() -> list[dict[str, float]]:
    """Milliseconds of one sample of the scalar instruments, by blocks."""
    args = argparse.Namespace(
        samples=5, batch=BASE["sequences"], length=BASE["length"], interval=10
    )
    rows = []
    for blocks in (2, 4, 8, 16):
        costs = {
            name: instruments_cost.measure(name, model_of(blocks=blocks), args)
            for name in ("amax_gain", "stream_diversity")
        }
        rows.append(
            {"blocks": blocks}
            | {name: round(1e3 * cost["seconds_per_sample"], 2) for name, cost in costs.items()}
        )
    return rows


def checkpoint_curve(folder: Path) -> list[dict[str, float]]:
    """Megabytes of a checkpoint, and milliseconds to save and to read it, by width."""
    rows = []
    for dim in (64, 128, 256, 512):
        tokens: Any = torch.randint(0, 257, (1, 33))
        trainer = pl.Trainer(
            max_steps=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model_of(dim=dim), DataLoader(tokens))
        file = folder / f"{dim}.ckpt"
        saves, reads = [], []
        for _ in range(REPEATS):
            start = time.process_time()
            trainer.save_checkpoint(file)
            saves.append(time.process_time() - start)
            start = time.process_time()
            torch.load(file, weights_only=False)
            reads.append(time.process_time() - start)
        rows.append(
            {
                "dim": dim,
                "megabytes": round(file.stat().st_size / 1e6, 2),
                "save": round(1e3 * statistics.median(saves), 2),
                "read": round(1e3 * statistics.median(reads), 2),
            }
        )
    return rows


def growth(rows: list[dict[str, float]]) -> dict[str, float]:
    """The power with which each column grows over the last doubling of the first."""
    (what, *columns) = rows[-1]
    doublings = math.log(rows[-1][what] / rows[-2][what])
    return {
        name: round(math.log(rows[-1][name] / rows[-2][name]) / doublings, 2) for name in columns
    }


def draw(curves: dict[str, list[dict[str, float]]], picture: Path) -> None:
    """One panel for each curve, both axes logarithmic."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    panels = figure.subplots(2, math.ceil(len(curves) / 2))
    for axes in panels.flat:
        axes.set_visible(False)
    for axes, (name, rows) in zip(panels.flat, curves.items(), strict=False):
        axes.set_visible(True)
        what, *columns = rows[0]
        x = [row[what] for row in rows]
        for column, colour in zip(columns, RUN_COLOURS, strict=False):
            axes.plot(x, [row[column] for row in rows], "o-", color=colour, label=column, ms=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        style_axes(axes)
        axes.set_xticks(x, [f"{value:,}" for value in x])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel(what, fontsize=8)
        axes.set_ylabel("ms or MB" if "megabytes" in columns else "ms", fontsize=8)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="draw the curves into this PNG file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    instruments_cost.clock = time.process_time

    curves = {name: step_curve(name) for name in CURVES}
    curves["instruments, one sample"] = instrument_curve()
    with tempfile.TemporaryDirectory() as folder:
        curves["checkpoint"] = checkpoint_curve(Path(folder))
    if args.picture is not None:
        draw(curves, args.picture)
    results = {"base": BASE, "curves": curves}
    report("growth", results | {"growth": {name: growth(rows) for name, rows in curves.items()}})


if __name__ == "__main__":
    main()
