"""Run folders with known numbers, as `fit` or another project would leave them."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

STEPS = range(10, 1001, 10)
LAYERS = 60
GAINS = [
    f"amax_gain/{kind}/{direction}"
    for kind in ("single", "composite")
    for direction in ("forward", "backward")
]
CONNECTIONS = {
    "residual": "ResidualConnection",
    "hc": "HyperConnection",
    "mhc": "ManifoldHyperConnection",
}


def settings(connection: str, folder: Path, seed: int = 1) -> dict[str, Any]:
    part = {"_target_": f"mhc_lightning.modules.{CONNECTIONS[connection]}", "_partial_": True}
    return {
        "seed": seed,
        "output_dir": str(folder),
        "model": {"connection": part, "dim": 64, "num_layers": LAYERS // 2, "num_streams": 4},
        "connection": part,
        "data": {"path": "data/${mine}", "batch_size": 8, "sequence_length": 128, "seed": seed},
        "optimizer": {"lr": 0.004},
        "trainer": {"max_steps": 1000, "log_every_n_steps": 10, "precision": "32-true"},
        "logger": {"csv": {"folder": str(folder)}},
    }


def environment(folder: Path, connection: str, seed: int = 1) -> dict[str, Any]:
    words = ["fit", "--config", "mhc_quickstart", f"connection={connection}"]
    return {
        "versions": {"python": "3.11.7", "torch": "2.13.0", "mhc-lightning": "0.1.0"},
        "device": "A processor",
        "processor": "A processor",
        "threads": 2,
        "commit": "0123456789abcdef0123456789abcdef01234567+changes",
        "arguments": [*words, f"seed={seed}", f"output_dir={folder}", "overwrite=true"],
        "started": "2026-03-01T12:30:00+00:00",
        "processes": 1,
        "parameters": {"total": 1234567},
        "data": {"content": ["feedbeef" * 4]},
        "ended": {"reason": "complete", "non_finite": False, "step": 1000},
    }


def losses(seed: int = 0, offset: float = 0.0, own: float = 0.02) -> dict[int, float]:
    """A falling loss: noise that all runs share (of their batches), some of their own."""
    shared = np.random.default_rng(1000)
    mine = np.random.default_rng(seed)
    return {
        step: 3 + 2 * float(np.exp(-step / 150)) + offset * min(1.0, step / 300)
        + float(0.1 * shared.normal() + own * mine.normal())
        for step in STEPS
    }  # fmt: skip


def gains(value: Callable[[str, int, int], float]) -> dict[str, dict[int, float]]:
    """Gains from a function of tag, sub-layer and step."""
    table: dict[str, dict[int, float]] = {}
    for tag in GAINS:
        for step in STEPS:
            row = [value(tag, k, step) for k in range(LAYERS)]
            table.setdefault(tag, {})[step] = max(row)
            for k, gain in enumerate(row):
                table.setdefault(f"{tag}/layer_{k}", {})[step] = gain
    return table


def one(tag: str, layer: int, step: int) -> float:
    return 1.0


def exploding(tag: str, layer: int, step: int) -> float:
    """Composite backward: 41 at step 900 in sub-layers 38 to 44; it passes 2 at step 320."""
    if tag != "amax_gain/composite/backward":
        return 1.0
    height = 41.0 if 38 <= layer <= 44 else 1.5
    return 1 + (height - 1) * (1 - abs(step - 900) / 605 if step > 300 else 0.0)


def write_table(folder: Path, scalars: Mapping[str, Mapping[int, float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    steps = sorted({step for points in scalars.values() for step in points})
    with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *scalars])
        for step in steps:
            writer.writerow([step, *(points.get(step, "") for points in scalars.values())])


def write_events(
    folder: Path,
    scalars: Mapping[str, Mapping[int, float]],
    pictures: Sequence[str] = ("layer_0", "composite_0_to_59"),
    **options: Any,
) -> None:
    """As somebody else's training loop would."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), **options)
    for tag, points in scalars.items():
        for step, value in points.items():
            writer.add_scalar(tag, value, step)
    picture = np.full((4, 5, 3), 200, np.uint8)
    last = max(step for points in scalars.values() for step in points)
    for step in (1, last):
        for name in pictures:
            writer.add_image(f"stream_matrices/{name}", picture, step, dataformats="HWC")
    writer.close()


def write_run(folder: Path, connection: str, scalars: dict[str, Any], seed: int = 1) -> Path:
    """All that `fit` leaves."""
    write_table(folder, scalars)
    text = yaml.safe_dump(settings(connection, folder, seed)).replace("${", "\\${")
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    record = json.dumps(environment(folder, connection, seed))
    (folder / "environment.json").write_text(record, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: residual, hc (explodes), mhc (killed at step 800), and foreign."""
    folder = tmp_path_factory.mktemp("runs = of ${mine}, {1}")
    norm = dict.fromkeys(STEPS, 0.5)
    speed = {step: 1000.0 + step for step in STEPS}
    memory = {step: 2.0**30 + step for step in STEPS}
    more = {"train/tokens_per_second": speed, "train/peak_memory_bytes": memory}
    write_run(
        folder / "residual",
        "residual",
        {"train/loss": losses(1), "val/loss": {500: 3.1, 1000: 3.0}, "train/grad_norm": norm,
         **gains(one), "stream_diversity/mean": dict.fromkeys(STEPS, 0.0), **more},
    )  # fmt: skip
    write_run(
        folder / "hc",
        "hc",
        {"train/loss": losses(2, -0.016), "val/loss": {1000: 2.99},
         "train/grad_norm": {**norm, 600: 9.0}, **gains(exploding),
         "stream_diversity/mean": dict.fromkeys(STEPS, 0.4),
         "sinkhorn_residual/row": dict.fromkeys(STEPS, 0.7),
         "sinkhorn_residual/column": dict.fromkeys(STEPS, 0.6), **more},
    )  # fmt: skip
    killed = write_run(
        folder / "mhc",
        "mhc",
        {tag: {step: value for step, value in points.items() if step <= 800} for tag, points in
         {"train/loss": losses(3, -0.021), "train/grad_norm": norm, **gains(one)}.items()},
    )  # fmt: skip
    record = json.loads((killed / "environment.json").read_text())
    del record["ended"]
    (killed / "environment.json").write_text(json.dumps(record))
    with open(killed / "metrics.csv", "a", encoding="utf-8") as file:
        file.write("810,3.0")  # cut by the kill
    write_events(folder / "foreign", {"train/loss": losses(4, 0.05)})
    return folder


@pytest.fixture(scope="session")
def write() -> SimpleNamespace:
    """The functions that write run folders, and numbers to write."""
    return SimpleNamespace(
        table=write_table, events=write_events, run=write_run, losses=losses, gains=gains, one=one
    )
