"""Train with Ray Train: workers that Ray starts, on one machine or a cluster.

Three lines of the Trainer are Ray's (the strategy, the environment, `prepare_trainer`), and a
callback that hands checkpoints over. Ray starts a worker that failed again, and the run goes on
from the last checkpoint, exactly:

    python -m mhc_lightning prepare --config mhc_quickstart input=my_texts output=data/mine
    python examples/ray_train.py data/mine --workers 2

It needs `pip install 'ray[train]'`.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import (
    RayDDPStrategy,
    RayLightningEnvironment,
    RayTrainReportCallback,
    prepare_trainer,
)
from ray.train.torch import TorchTrainer

from mhc_lightning import LanguageModel, TextDataModule
from mhc_lightning.modules import ManifoldHyperConnection, Transformer
from mhc_lightning.optimizers import AdamWRecipe


class FailOnce(pl.Callback):
    """Ends the process of rank 0 at a step, the first time that it is reached."""

    def __init__(self, step: int, note: Path) -> None:
        self.step, self.note = step, note

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """End this process without a word, as a lost machine does."""
        fails = trainer.global_step == self.step and trainer.global_rank == 0
        if fails and not self.note.exists():
            self.note.write_text(f"failed at step {self.step}\n")
            os._exit(1)


def build(settings: dict[str, Any]) -> tuple[LanguageModel, TextDataModule]:
    """The model and the data, the same in every worker."""
    pl.seed_everything(0)
    network = Transformer(
        connection=ManifoldHyperConnection, num_streams=4, vocab_size=257, dim=32, num_layers=2,
        num_heads=2, head_dim=16, rope_dim=8, kv_rank=16, ffn_dim=88,
    )  # fmt: skip
    recipe = AdamWRecipe(lr=5e-3, warmup_steps=5, schedule="cosine")
    data = TextDataModule(settings["data"], batch_size=8, micro_batch_size=None, sequence_length=64)
    return LanguageModel(network, recipe), data


def train(settings: dict[str, Any]) -> None:
    """What each worker runs."""
    model, data = build(settings)
    callbacks: list[pl.Callback] = [RayTrainReportCallback()]
    if settings["fail_at_step"] is not None:
        callbacks.append(FailOnce(settings["fail_at_step"], Path(settings["storage"], "failed")))
    trainer = prepare_trainer(
        pl.Trainer(
            strategy=RayDDPStrategy(),
            plugins=[RayLightningEnvironment()],
            devices="auto",
            accelerator="auto",
            max_epochs=settings["epochs"],
            limit_train_batches=settings["steps_per_epoch"],
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            logger=False,
        )
    )
    reported = ray.train.get_checkpoint()
    if reported is None:
        trainer.fit(model, datamodule=data)
        return
    with reported.as_directory() as folder:
        path = Path(folder, RayTrainReportCallback.CHECKPOINT_NAME)
        # The run's own checkpoint: Lightning does not have to suspect it.
        trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=False)


def main() -> None:
    """Start Ray on this machine, or join a cluster (`RAY_ADDRESS`), and train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="a folder that prepare wrote")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps-per-epoch", type=int, default=10)
    parser.add_argument("--storage", type=Path, default=Path("runs/ray"))
    parser.add_argument("--fail-at-step", type=int, help="end a worker there, once")
    arguments = parser.parse_args()
    arguments.storage.mkdir(parents=True, exist_ok=True)
    settings = {**vars(arguments), "data": str(arguments.data.resolve())}
    settings["storage"] = str(arguments.storage.resolve())
    result = TorchTrainer(
        train,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=arguments.gpu),
        run_config=RunConfig(
            name="mhc",
            storage_path=settings["storage"],
            failure_config=FailureConfig(max_failures=1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()
    assert result.metrics is not None
    print(f"step {result.metrics['step']}: validation loss {result.metrics['val/loss']!r}")


if __name__ == "__main__":
    main()
