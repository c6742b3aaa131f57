"""Validates one tiny model under many layouts and saves the metrics; started by torchrun."""

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from mhc_lightning import LanguageModel, TextDataModule
from mhc_lightning.modules import ManifoldHyperConnection, Transformer
from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.strategies import FullyShardedStrategy, PipelineStrategy

STRATEGIES: dict[str, Any] = {
    "single": lambda: SingleDeviceStrategy(torch.device("cpu")),
    "ddp": DDPStrategy,
    "fsdp": FullyShardedStrategy,
    "pipeline": PipelineStrategy,
}


def build(precision: str) -> LanguageModel:
    pl.seed_everything(0, verbose=False)
    network = Transformer(
        connection=ManifoldHyperConnection,
        vocab_size=257,
        dim=16,
        num_layers=6,
        num_heads=2,
        ffn_dim=24,
        head_dim=8,
        rope_dim=4,
        kv_rank=8,
        init_std=0.3,
        num_experts=4,
        num_active_experts=2,
        num_shared_experts=1,
    )
    if precision == "float64":
        network.double()
    return LanguageModel(network, AdamWRecipe(lr=1.0))


def trainer(case: dict[str, Any], devices: int, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=STRATEGIES[case["strategy"]](**case.get("layout", {})),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )


def data(case: dict[str, Any], path: str) -> TextDataModule:
    return TextDataModule(
        path,
        batch_size=case["size"],
        micro_batch_size=case["size"],
        sequence_length=24,
        validation_sequences=case.get("sequences"),
    )


def main(cases: str, path: str, output: str, devices: str) -> None:
    found = {}
    for name, case in json.loads(cases).items():
        run = trainer(case, int(devices))
        run.validate(build(case["precision"]), datamodule=data(case, path), verbose=False)
        found[name] = {tag: float(value) for tag, value in run.callback_metrics.items()}
    if run.is_global_zero:
        Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
