"""TensorBoard's tab HPARAMS shows a run's hyper-parameters beside its losses."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from networks import tiny_transformer
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.loggers import TensorBoard
from mhc_lightning.optimizers import AdamWRecipe

ROWS: Any = torch.randint(0, 40, (8, 9), generator=torch.Generator().manual_seed(0))


def shown(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Hyper-parameters and metrics of the one run in a folder, as the tab shows them."""
    runs = EventMultiplexer()
    runs.AddRunsFromDirectory(str(folder))
    runs.Reload()
    provider = MultiplexerDataProvider(runs, str(folder))
    context, request = Context(TBContext(data_provider=provider)), RequestContext()
    metadata = context.hparams_metadata(request, "")
    experiment = context.experiment_from_metadata(request, "", True, metadata, [])
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=10,
        allowed_statuses=[api_pb2.STATUS_SUCCESS],
        col_params=[{"metric": metric.name} for metric in experiment.metric_infos],
    )
    (group,) = Handler(request, context, "", asked).run().session_groups
    values = {name: getattr(v, v.WhichOneof("kind")) for name, v in group.hparams.items()}
    return values, {metric.name.tag: metric.value for metric in group.metric_values}


def fit(logger: Any, steps: int = 4, **more: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = LanguageModel(tiny_transformer(), AdamWRecipe(lr=1e-2, weight_decay=0.25))
    trainer.fit(module, DataLoader(ROWS, batch_size=2), DataLoader(ROWS, batch_size=2), **more)
    return trainer


@pytest.mark.parametrize("ours", [True, False])
def test_the_tab_has_flat_names_and_the_losses(tmp_path, ours):
    logger = TensorBoard(tmp_path) if ours else TensorBoardLogger(tmp_path)
    trainer = fit(logger)
    values, metrics = shown(tmp_path)
    assert values["model/dim"] == 16 and values["optimizer/weight_decay"] == 0.25
    assert values["connection/class"] == "mhc_lightning.modules.ManifoldHyperConnection"
    assert values["optimizer/betas"] == "[0.9, 0.95]"
    assert values["compile"] == 0 and values["recompute"] == "off"
    loss = float(trainer.callback_metrics["val/loss"])
    assert metrics == {
        "val/loss": pytest.approx(loss, rel=1e-6),
        "train/loss": pytest.approx(float(trainer.callback_metrics["train/loss"]), rel=1e-6),
    }


def test_a_resumed_run_shows_its_present_hyper_parameters(tmp_path):
    first = TensorBoard(tmp_path)
    first.log_hyperparams({"optimizer": {"lr": 0.5}})
    first.log_metrics({"val/loss": 3.0}, 2)
    first.log_metrics({"val/loss": 2.0}, 4)
    first.finalize("success")
    second = TensorBoard(tmp_path)
    second.log_hyperparams({"optimizer": {"lr": 0.25}})
    second.resume_from(2)
    second.finalize("success")
    values, metrics = shown(tmp_path)
    assert values == {"optimizer/lr": 0.25}
    assert metrics["val/loss"] == 3.0


def test_other_loggers_get_them_from_lightning(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(logger, steps=1)
    text = (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert "class: mhc_lightning.modules.Transformer" in text and "lr: 0.01" in text
