"""Trains a tiny model in legs, each in a layout of its own; started by torchrun or alone."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.checkpoints import folder_writing
from mhc_lightning.checkpoints.run_checkpoint import RunCheckpoint
from mhc_lightning.errors import NonFiniteLossError
from mhc_lightning.loggers import MetricsCSV
from mhc_lightning.modules import ManifoldHyperConnection, Transformer
from mhc_lightning.modules.initialisation import held_rows
from mhc_lightning.optimizers.recipes import AdamWRecipe, MuonRecipe, OptimizerRecipe
from mhc_lightning.strategies import FullyShardedStrategy, PipelineStrategy
from mhc_lightning.strategies.layout import layout_of

SEQUENCES = 8  # per optimizer step
STRATEGIES = {
    "single": lambda **_: SingleDeviceStrategy(torch.device("cpu")),
    "ddp": DDPStrategy,
    "fsdp": FullyShardedStrategy,
    "pipeline": PipelineStrategy,
}


class Tokens(torch.utils.data.Dataset):
    """A process's share of batches, from a step on; frequent tokens come first."""

    def __init__(self, start: int, replica: int, replicas: int) -> None:
        self.start, self.replica, self.replicas = start, replica, replicas

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.start + index)
        tokens = torch.rand(SEQUENCES, 9, generator=generator) ** 2 * 40
        return tokens.long().unflatten(0, (self.replicas, -1))[self.replica]


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(self._tokens(self.trainer.global_step), batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.utils.data.Subset(self._tokens(1000), range(2)), batch_size=None)

    def _tokens(self, start: int) -> Tokens:
        layout = layout_of(self.trainer.strategy)
        return Tokens(start, layout.data_parallel_rank, layout.data_parallel_size)


class Noisy(LanguageModel):
    """Each process changes its gradients by its own generator, if it is to."""

    noise = False
    spoils_step: int | None = None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.parameters() if self.noise else ():
            if parameter.grad is not None:
                parameter.grad.mul_(1 + 0.1 * float(torch.rand(())))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        last = self.trainer.global_rank == self.trainer.world_size - 1
        if last and self.trainer.global_step + 1 == self.spoils_step:
            with torch.no_grad():
                held_rows(next(self.parameters()))[0].fill_(float("nan"))


def build(optimizer: type[OptimizerRecipe]) -> Noisy:
    pl.seed_everything(0, verbose=False)
    network = Transformer(
        connection=ManifoldHyperConnection,
        vocab_size=40,
        dim=16,
        num_layers=4,
        num_heads=2,
        ffn_dim=24,
        head_dim=8,
        rope_dim=4,
        kv_rank=8,
        init_std=0.1,
        num_experts=4,
        num_active_experts=2,
        num_shared_experts=1,
    )
    network.double()  # rounding hides nothing
    return Noisy(network, optimizer(lr=1e-2, eps=1e-8, schedule="constant"))


def kill_when_writing(step: int) -> None:
    """End the last process, without notice, when it has written a shard of this step."""
    real = folder_writing._Writer.write_data

    def write(self: Any, *args: Any) -> Any:
        done = real(self, *args)
        if self._name.name.endswith(f"{step:08d}") and torch.distributed.get_rank() > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(folder_writing._Writer, "write_data", write)  # noqa: B010


def run(leg: dict[str, Any], output: Path) -> None:
    folder = output / leg["folder"]
    model = build(MuonRecipe if leg.get("muon") else AdamWRecipe)
    model.noise, model.spoils_step = leg.get("noise", False), leg.get("spoils_step")
    if leg.get("kill_at"):
        kill_when_writing(leg["kill_at"])
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=[RunCheckpoint(folder / "checkpoints", **{"every_n_steps": 2, **leg["save"]})],
        accelerator="cpu",
        devices=leg.get("devices", 1),
        strategy=STRATEGIES[leg["strategy"]](**leg.get("layout", {})),
        max_steps=leg["steps"],
        logger=[MetricsCSV(folder)],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    pl.seed_everything(7 + trainer.global_rank if leg.get("noise") else 7, verbose=False)
    resume = leg.get("resume")
    trainer.fit(
        model,
        datamodule=Data(),
        ckpt_path=(folder / "checkpoints" / resume).resolve() if resume else None,
        weights_only=False,
    )


if __name__ == "__main__":
    for leg in json.loads(sys.argv[1]):
        if leg.get("spoils_step") is None:
            run(leg, Path(sys.argv[2]))
            continue
        try:
            run(leg, Path(sys.argv[2]))
        except NonFiniteLossError as error:  # an exit would have the launcher end the others
            (Path(sys.argv[2]) / f"{leg['folder']}-{os.environ['RANK']}").write_text(str(error))
