"""Trains under an alarm once per strategy; each of two processes writes its actions and numbers."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.callbacks import AmaxGain, StabilityAlarm, Throughput
from mhc_lightning.checkpoints.run_checkpoint import RunCheckpoint
from mhc_lightning.loggers import MetricsCSV
from mhc_lightning.modules import HyperConnection, Transformer
from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.strategies import FullyShardedStrategy, PipelineStrategy

STRATEGIES = {"ddp": DDPStrategy, "fsdp": FullyShardedStrategy, "pipeline": PipelineStrategy}
SCALED, FAILED = 20, 25  # optimizer steps


class Model(LanguageModel):
    """A matrix of it is scaled up in one step; in another, one process alone finds no loss."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step + 1 == SCALED:
            matrix = dict(self.named_parameters()).get("model.output.weight")
            if matrix is not None:
                matrix.data.mul_(100.0)
        loss = super().training_step(batch, batch_idx)
        if self.global_step + 1 == FAILED and self.trainer.global_rank == 1:
            self._step_losses[-1] = loss.detach() * math.nan
        return loss

    def on_train_batch_start(self, *_: Any) -> None:
        if self.global_step == SCALED:  # after one update left out
            with torch.no_grad():
                matrix = dict(self.named_parameters()).get("model.output.weight")
                if matrix is not None:
                    matrix.data.mul_(0.01)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.rates: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def main(folder: Path, *names: str) -> None:
    for name in names:
        pl.seed_everything(0, verbose=False)
        network = Transformer(
            connection=HyperConnection,
            vocab_size=40,
            dim=16,
            num_layers=4,
            num_heads=2,
            ffn_dim=24,
            head_dim=8,
            rope_dim=4,
            kv_rank=8,
            init_std=0.05,
        )
        model = Model(network, AdamWRecipe(lr=1e-3, eps=1e-8, schedule="constant"))
        alarm = StabilityAlarm(
            ["checkpoint", "skip_update", "lower_lr"], window=32, max_skips=2, cooldown=3
        )
        gain, throughput = AmaxGain(), Throughput()
        saver = RunCheckpoint(folder / name, every_n_steps=None)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=STRATEGIES[name](),
            max_steps=28,
            max_epochs=-1,
            gradient_clip_val=1.0,
            log_every_n_steps=2,
            logger=MetricsCSV(folder / name),
            callbacks=[gain, alarm, throughput, saver],
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
        tokens = torch.randint(0, 40, (28, 8, 9), generator=torch.Generator().manual_seed(1))
        if name != "pipeline":
            tokens = tokens.unflatten(1, (2, 4))[:, trainer.global_rank]
        rows: Any = tokens.flatten(0, 1)
        trainer.fit(model, DataLoader(rows, batch_size=tokens.shape[1]))
        trainer.strategy.barrier()  # the first process writes the last checkpoint
        record = {
            "interventions": alarm.interventions,
            "rates": model.rates,
            "state": alarm.state_dict(),
            "step": trainer.global_step,
            "gain": gain.last["amax_gain/composite/backward"],
            "tokens": throughput.total_tokens,
            "saved": sorted(file.name for file in (folder / name).glob("step_*")),
        }
        (folder / f"{name}_{trainer.global_rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
