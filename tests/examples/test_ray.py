"""The example of Ray Train, on two workers of this machine."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest

from mhc_lightning.data.preparation import prepare

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_train.py"


@pytest.mark.slow
def test_workers_of_which_one_is_lost_train_as_one_process_does(tmp_path: Path) -> None:
    texts = tmp_path / "text"
    texts.mkdir()
    for k in range(8):
        (texts / f"{k}.txt").write_text(f"the number {k} follows {k - 1}, " * 400)
    prepare(texts, tmp_path / "data", validation_fraction=0.25, num_workers=1, progress=False)
    # Ray's workers import what this process does, and need not be nice.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_worker_niceness": "0"}
    options = ["--storage", str(tmp_path / "ray"), "--epochs=2", "--steps-per-epoch=4"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path / "data"), *options, "--fail-at-step=6"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "ray" / "failed").read_text() == "failed at step 6\n"
    said, loss = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert said == "step 8: validation loss"

    model, data = runpy.run_path(str(EXAMPLE))["build"]({"data": str(tmp_path / "data")})
    alone = pl.Trainer(
        max_epochs=2, limit_train_batches=4, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    alone.fit(model, datamodule=data)
    assert float(loss) == pytest.approx(alone.callback_metrics["val/loss"].item(), abs=1e-6)
