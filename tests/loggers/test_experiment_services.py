"""The loggers of W&B and MLflow, offline: numbers, pictures and hyper-parameters arrive."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import mlflow as lightnings_mlflow
from lightning.pytorch.loggers import wandb as lightnings_wandb
from networks import tiny_transformer
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.callbacks import AmaxGain, StreamMatrixHeatmap
from mhc_lightning.errors import UserError
from mhc_lightning.loggers import MLflow, WandB
from mhc_lightning.optimizers import AdamWRecipe

ROWS: Any = torch.randint(0, 40, (8, 9), generator=torch.Generator().manual_seed(0))


def fit(logger: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=4,
        logger=logger,
        log_every_n_steps=2,
        callbacks=[AmaxGain(), StreamMatrixHeatmap(every_n_steps=4)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = LanguageModel(tiny_transformer(), AdamWRecipe(lr=1e-2))
    trainer.fit(module, DataLoader(ROWS, batch_size=2), DataLoader(ROWS, batch_size=2))
    return trainer


def test_mlflow_keeps_numbers_pictures_and_parameters_in_a_folder(tmp_path: Path) -> None:
    logger = MLflow(f"file:{tmp_path}/store", "streams")
    trainer = fit(logger)
    client, run = logger.experiment, logger.run_id
    assert run is not None
    content = client.get_run(run)
    loss = float(trainer.callback_metrics["val/loss"])
    assert content.data.metrics["val/loss"] == pytest.approx(loss)
    assert content.info.status == "FINISHED"
    assert content.data.params["model/dim"] == "16"
    assert content.data.params["connection/class"].endswith("ManifoldHyperConnection")
    steps = [point.step for point in client.get_metric_history(run, "train/loss")]
    assert steps == [2, 4]
    assert {"amax_gain/single.forward", "amax_gain/single.forward.layer_0"} <= set(
        content.data.metrics
    )
    pictures = [file.path for file in client.list_artifacts(run, "images")]
    assert any("stream_matrices" in name and name.endswith(".png") for name in pictures)


def test_wandb_keeps_them_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandB(project="streams", save_dir=str(tmp_path))
    trainer = fit(logger)
    run = logger.experiment
    assert run.summary["val/loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]))
    assert run.config["model"]["dim"] == 16
    assert run.summary["amax_gain/single/forward/layer_0"] > 0
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert list(folder.glob("files/media/images/stream_matrices/layer_0_*.png"))
    run.finish()


@pytest.mark.parametrize(
    ("make", "module", "flag", "extra"),
    [
        (lambda: MLflow("file:x", "y"), lightnings_mlflow, "_MLFLOW_AVAILABLE", "mlflow"),
        (lambda: WandB(project="y"), lightnings_wandb, "_WANDB_AVAILABLE", "wandb"),
    ],
)
def test_a_missing_package_is_named(
    make: Any, module: Any, flag: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, flag, False)
    with pytest.raises(UserError, match=rf"pip install \"mhc-lightning\[{extra}\]\""):
        make()


def test_the_configurations_name_loggers_that_there_are(repository: Path) -> None:
    for name, kind in (("wandb", WandB), ("mlflow", MLflow)):
        group = yaml.safe_load((repository / f"configs/logger/{name}.yaml").read_text())
        assert set(group) == {"csv", name}
        assert group[name]["_target_"] == f"mhc_lightning.loggers.{kind.__name__}"
