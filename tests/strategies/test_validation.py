"""One checkpoint has one validation loss: in any batches, on any number of processes."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import validate_in_processes
from validate_in_processes import build, data, trainer

from mhc_lightning.data import PreparedData, prepare
from mhc_lightning.modules.mixture_of_experts import LoadBalance

SCRIPT = Path(validate_in_processes.__file__)
SIZES = [1, 2, 3, 5, 16]
NEAR = {"float64": 1e-12, "float32": 1e-6}


def case(strategy: str, size: int, precision: str = "float64", **more: Any) -> dict[str, Any]:
    return {"strategy": strategy, "size": size, "precision": precision, **more}


def pipeline(schedule: str, size: int, **layout: Any) -> dict[str, Any]:
    return case("pipeline", size, layout={"schedule": schedule, **layout})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held out are 38 sequences, of which the last ones of both chunks are short."""
    folder = tmp_path_factory.mktemp("prepared")
    generator = np.random.default_rng(0)
    (folder / "texts").mkdir()
    for number in range(30):
        letters = generator.integers(97, 110, int(generator.integers(40, 120))).astype(np.uint8)
        (folder / "texts" / f"{number}.txt").write_bytes(letters.tobytes())
    prepare(
        folder / "texts",
        folder / "data",
        chunk_bytes=500,
        validation_fraction=0.4,
        progress=False,
    )
    return folder / "data"


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, float]:
    """By hand: each sequence alone, unpadded, and its logits in float64."""
    prepared, model, losses = PreparedData(folder), build("float64").eval(), []
    for chunk in prepared.chunks("validation"):
        tokens = torch.from_numpy(np.asarray(prepared.tokens(chunk)).astype(np.int64))
        for start in range(0, len(tokens) - 1, 24):
            row = tokens[start : start + 25]
            with torch.no_grad():
                logits = model(row[None, :-1])[0]
            losses.append(F.cross_entropy(logits, row[1:], reduction="none"))
    every = torch.cat(losses)
    chunks = prepared.chunks("validation")
    assert len(every) == sum(chunk.tokens - 1 for chunk in chunks)
    assert sum((chunk.tokens - 1) % 24 > 0 for chunk in chunks) > 1, "several short ones"
    mean = float(every.mean())
    return {"val/loss": mean, "val/perplexity": float(np.exp(mean)), "val/tokens": len(every)}


def assert_same(found: dict[str, float], expected: dict[str, float], precision: str) -> None:
    assert found["val/tokens"] == expected["val/tokens"]
    for tag in ("val/loss", "val/perplexity"):
        assert found[tag] == pytest.approx(expected[tag], rel=NEAR[precision], abs=0), tag


def validate(
    cases: dict[str, dict[str, Any]], folder: Path, output: Path, processes: int
) -> Iterator[tuple[dict[str, float], dict[str, Any]]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *launcher, SCRIPT, json.dumps(cases), folder, output, str(processes)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(output.read_text())
    assert list(found) == list(cases)
    return ((found[name], cases[name]) for name in cases)


@pytest.mark.parametrize(
    ("size", "precision"), [(5, "float32"), (1, "float64"), (3, "float64"), (16, "float64")]
)
def test_on_one_device(size: int, precision: str, folder: Path, expected: dict[str, float]) -> None:
    one = case("single", size, precision)
    run = trainer(one, 1)
    run.validate(build(precision), datamodule=data(one, str(folder)), verbose=False)
    found = {tag: float(value) for tag, value in run.callback_metrics.items()}
    assert_same(found, expected, precision)


def test_during_training_too(folder: Path, expected: dict[str, float]) -> None:
    """Where nothing moves, `fit` logs what `validate` measures, at every validation."""
    one, seen = case("single", 5), []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append({tag: float(value) for tag, value in trainer.callback_metrics.items()})

    model = build("float64")
    model.optimizer = dataclasses.replace(model.optimizer, lr=1e-300)
    for module in model.modules():
        if isinstance(module, LoadBalance):
            module.update_speed = 0.0
    steps = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer(one, 1, callbacks=[Watch()], **steps).fit(model, datamodule=data(one, str(folder)))
    assert len(seen) == 2
    for found in seen:
        assert_same(found, expected, "float64")


def test_on_two_processes(folder: Path, expected: dict[str, float], tmp_path: Path) -> None:
    cases = {
        "ddp": case("ddp", 3),
        "fsdp": case("fsdp", 5),
        "pipeline": pipeline("zbv", 3, microbatches=3),
        "one sequence": case("ddp", 4, sequences=1),
    }
    *every, (one, _) = validate(cases, folder, tmp_path / "found.json", 2)
    for found, of in every:
        assert_same(found, expected, of["precision"])
    assert one["val/tokens"] == 24


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_under_every_layout(
    processes: int, folder: Path, expected: dict[str, float], tmp_path: Path
) -> None:
    schedules = ["gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev"]
    cases = [
        *(case(strategy, size) for strategy in ("ddp", "fsdp") for size in SIZES),
        *(case(strategy, 3, "float32") for strategy in ("ddp", "fsdp")),
        *(pipeline(schedule, size) for schedule in schedules for size in (1, 3, 16)),
        *(pipeline("gpipe", size, pipeline_size=1) for size in (5, 16)),
        pipeline("1f1b", 16, microbatches=4) | {"precision": "float32"},
    ]
    numbered = {str(number): of for number, of in enumerate(cases)}
    for found, of in validate(numbered, folder, tmp_path / "found.json", processes):
        assert_same(found, expected, of["precision"])
