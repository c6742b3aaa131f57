"""Trains a network with a memory under some strategies; each process writes what it saw of it."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.callbacks import MemoryUse
from mhc_lightning.modules import Engram, ManifoldHyperConnection, Transformer
from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.strategies import DataParallelStrategy, FullyShardedStrategy, PipelineStrategy

STRATEGIES: dict[str, Any] = {
    "ddp": DataParallelStrategy,
    "fsdp": FullyShardedStrategy,
    "pipeline": partial(PipelineStrategy, microbatches=2),
}
HALVES = {"first_half": 0, "second_half": 1}  # of the batch, in one process


def train(name: str) -> dict[str, float]:
    """The last sample of this process."""
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
        memory=partial(Engram, rows=50, dim=8, num_heads=2, layers=[0, 3], zero_start=False),
    )
    model = LanguageModel(network, AdamWRecipe(lr=1e-12, schedule="constant"))
    use, single = MemoryUse(2), name in HALVES
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if single else 2,
        strategy=SingleDeviceStrategy(torch.device("cpu")) if single else STRATEGIES[name](),
        max_steps=2,
        logger=False,
        callbacks=[use],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    tokens = (torch.rand(2, 8, 9, generator=torch.Generator().manual_seed(1)) ** 3 * 40).long()
    if name != "pipeline":
        tokens = tokens.unflatten(1, (2, 4))[:, HALVES.get(name, trainer.global_rank)]
    rows: Any = tokens.flatten(0, 1)
    trainer.fit(model, DataLoader(rows, batch_size=tokens.shape[1]))
    return use.last


if __name__ == "__main__":
    for strategy in sys.argv[2:]:
        seen = train(strategy)
        rank = torch.distributed.get_rank()
        (Path(sys.argv[1]) / f"{strategy}_{rank}.json").write_text(json.dumps(seen))
