"""A run whose every step depends on all that went before, to be stopped and resumed."""

import os
import random
import signal
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from mhc_lightning.checkpoints.names import candidates_for_last
from mhc_lightning.checkpoints.run_checkpoint import RunCheckpoint
from mhc_lightning.loggers import MetricsCSV


class Numbers(IterableDataset):
    """An endless stream whose k-th item is a function of k."""

    def __init__(self, start):
        self.start = start

    def __iter__(self):
        k = self.start
        while True:
            yield torch.sin(torch.arange(8.0) + k)
            k += 1


class Data(pl.LightningDataModule):
    micro = 2

    def train_dataloader(self):
        assert self.trainer is not None
        position = self.trainer.global_step * self.trainer.accumulate_grad_batches * self.micro
        return DataLoader(Numbers(position), batch_size=self.micro)

    def val_dataloader(self):
        rows: Any = [torch.cos(torch.arange(8.0) + k) for k in range(6)]
        return DataLoader(rows, batch_size=2)


class Noisy(pl.LightningModule):
    """A module whose every loss depends on all that went before, and on three generators."""

    def __init__(self, hook=None):
        super().__init__()
        torch.manual_seed(3)
        self.layer = torch.nn.Linear(8, 8)
        self.hook = hook or (lambda *_: None)

    def training_step(self, batch, batch_idx):
        self.hook("train", self.trainer, batch_idx)
        noise = torch.rand(8) + random.random() + np.random.rand()
        loss = (self.layer(batch * noise) - 1).square().mean()
        self.log("train/loss", loss)
        self.log("step", float(self.trainer.global_step + 1))
        return loss

    def validation_step(self, batch, batch_idx):
        self.hook("val", self.trainer, batch_idx)
        self.log("val/loss", self.layer(batch).square().mean())

    def on_validation_epoch_end(self):
        self.log("step", float(self.trainer.global_step))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def run(folder, steps=12, hook=None, resume=None, accumulate=3, callbacks=(), **settings):
    checkpoint = RunCheckpoint(folder / "checkpoints", **{"every_n_steps": 4, **settings})
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        accelerator="cpu",
        logger=[MetricsCSV(folder)],
        log_every_n_steps=1,
        callbacks=[*callbacks, checkpoint],
        accumulate_grad_batches=accumulate,
        val_check_interval=5 * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if resume is None:
        pl.seed_everything(7, verbose=False)
    else:
        pl.seed_everything(999, verbose=False)  # what is not restored will show
    trainer.fit(Noisy(hook), datamodule=Data(), ckpt_path=resume, weights_only=True)
    return checkpoint


def sigterm_at(stage, step, batch):
    def hook(where, trainer, batch_idx):
        micro = batch_idx % 3 if where == "train" else batch_idx
        if (where, trainer.global_step, micro) == (stage, step, batch):
            os.kill(os.getpid(), signal.SIGTERM)

    return hook


def newest(folder):
    return candidates_for_last(folder / "checkpoints")[0]
