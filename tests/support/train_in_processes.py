"""Trains a tiny model under some strategies and records each run; started by torchrun."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.modules import (
    Connection,
    ManifoldHyperConnection,
    Transformer,
    initialisation,
)
from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.strategies import FullyShardedStrategy

STRATEGIES: dict[str, Any] = {
    "single": lambda: SingleDeviceStrategy(torch.device("cpu")),
    "ddp": DDPStrategy,
    "fsdp": FullyShardedStrategy,
}


class Allocations(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, without those on meta.

    Of a sparse tensor its values count, which an operation made before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            plain = isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor)
            if plain and not tensor.is_sparse:
                self.largest = max(self.largest, 0 if tensor.is_meta else tensor.numel())
        return out


class Watched(LanguageModel):
    """Keeps losses, gradient norms and the dtypes that connections and blocks computed in."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.rows: list[dict[str, float]] = []
        self.dtypes: dict[str, set[str]] = {"phi": set(), "mappings": set(), "streams": set()}
        self.allocations = Allocations()

    def configure_model(self) -> None:
        with self.allocations:
            super().configure_model()

    def on_train_start(self) -> None:
        for module in self.model.modules():
            if isinstance(module, Connection):
                module.window.register_forward_hook(partial(self._see, module))

    def _see(self, connection: Connection, window: object, args: tuple, out: tuple) -> None:
        self.dtypes["phi"].add(str(connection.phi.dtype))
        self.dtypes["streams"].add(str(args[0].dtype))
        self.dtypes["mappings"].update(str(t.dtype) for t in out)

    def on_train_batch_end(self, *_: object) -> None:
        metrics = self.trainer.callback_metrics
        self.rows.append({tag: float(metrics[tag]) for tag in ("train/loss", "train/grad_norm")})


def train(strategy: str, precision: Any = "32-true", init: str = "whole") -> dict[str, Any]:
    """What this process sees of a run: metrics, dtypes, allocations, and rank zero's weights.

    Args:
        strategy: One of `STRATEGIES`.
        precision: The trainer's.
        init: ``meta`` to build the network there.
    """
    pl.seed_everything(0, verbose=False)
    initialisation._GROUP = 100  # values: some groups lie in both processes' parts
    with torch.device("meta" if init == "meta" else "cpu"), Allocations() as built:
        network = Transformer(
            connection=ManifoldHyperConnection,
            vocab_size=40,
            dim=16,
            num_layers=2,
            num_heads=2,
            ffn_dim=24,
            head_dim=8,
            rope_dim=4,
            kv_rank=8,
            init_std=0.05,
            num_experts=4,
            num_active_experts=2,
            num_shared_experts=1,
        )
    # Blocks of three sub-layers reach across two groups of parameters that are gathered apart.
    recompute = 3 if strategy == "fsdp" else "off"
    # An ordinary epsilon: with 1e-20 Adam turns rounding noise into whole steps.
    model = Watched(network, AdamWRecipe(lr=1e-2, eps=1e-8), recompute=recompute)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "single" else 2,
        strategy=STRATEGIES[strategy](),
        precision=precision,
        max_steps=5,
        gradient_clip_val=0.5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    tokens = torch.randint(0, 40, (5, 8, 9), generator=torch.Generator().manual_seed(1))
    rank, world = trainer.global_rank, trainer.world_size
    share = tokens.unflatten(1, (world, -1))[:, rank].flatten(0, 1)
    trainer.fit(model, DataLoader(share, batch_size=8 // world))
    state = trainer.strategy.lightning_module_state_dict()
    blocks: Any = network.blocks
    experts = blocks[1].feed_forward.body
    connections = [m for m in network.modules() if isinstance(m, Connection)]
    return {
        "rows": model.rows,
        "dtypes": {name: sorted(kinds) for name, kinds in model.dtypes.items()},
        "connection_parameters": sorted(
            {str(p.dtype) for c in connections for p in c.parameters()}
        ),
        "largest_allocation": max(built.largest, model.allocations.largest),
        "largest_parameter": max(p.numel() for p in network.parameters()),
        "sharded": all(isinstance(p, DTensor) for p in network.parameters()),
        "bias_of_experts": experts.balance.bias.tolist(),
        "parameters": {
            name: float(value.double().norm())
            for name, value in sorted(state.items())
            if value.is_floating_point() and value.dim() > 1
        },
    }


def main(cases: str, output: str) -> None:
    """Train case after case in one group of processes."""
    records = [train(*case) for case in json.loads(cases)]
    if torch.distributed.get_rank() == 0:
        Path(output).write_text(json.dumps(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
