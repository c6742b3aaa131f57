"""Trains a tiny mixture of experts in legs, each in a layout of its own; started by torchrun."""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.checkpoints.run_checkpoint import RunCheckpoint
from mhc_lightning.modules import (
    ManifoldHyperConnection,
    MixtureOfExperts,
    Transformer,
    initialisation,
)
from mhc_lightning.optimizers.recipes import AdamWRecipe, MuonRecipe
from mhc_lightning.strategies import FullyShardedStrategy, PipelineStrategy
from mhc_lightning.strategies.expert_exchange import _Way
from mhc_lightning.strategies.layout import layout_of, ranks_of

ACCUMULATED = 2
SEQUENCES = 16  # per optimizer step
EXPERTS = 8
STRATEGIES: dict[str, Any] = {
    "single": lambda **_: SingleDeviceStrategy(torch.device("cpu")),
    "fsdp": FullyShardedStrategy,
    "pipeline": PipelineStrategy,
}


class Sgd(AdamWRecipe):
    """Parameters under Adam cannot be compared closely: it divides by gradients near rounding."""

    def build_optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameter_groups(module.parameters()), lr=self.lr)


RECIPES: dict[str, Any] = {"sgd": Sgd, "adamw": AdamWRecipe, "muon": MuonRecipe}


class Watched(LanguageModel):
    """Keeps the metrics of every step, the first step's gradients, and loads of the experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: list[dict[str, float]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.loads: list[torch.Tensor] = []

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if not self.gradients:
            for name, parameter in self.named_parameters():
                grad = parameter.grad
                assert grad is not None
                whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                self.gradients[name] = whole.clone()
        super().configure_gradient_clipping(*args, **kwargs)
        own = [balance.load.clone() for balance in self._balances()]
        self.loads.append(torch.stack(own) if own else torch.zeros(0))

    def on_train_batch_end(self, *_: object) -> None:
        if (self.trainer.fit_loop.epoch_loop.batch_idx + 1) % ACCUMULATED == 0:
            metrics = self.trainer.callback_metrics
            tags = ("train/loss", "train/grad_norm", "experts/max_violation")
            self.rows.append({tag: float(metrics[tag]) for tag in tags})


def build(leg: dict[str, Any]) -> Watched:
    pl.seed_everything(0, verbose=False)
    initialisation._GROUP = 100  # values: some groups lie in several processes' parts
    with torch.device("meta" if leg.get("meta") else "cpu"):
        network = Transformer(
            connection=ManifoldHyperConnection,
            vocab_size=40,
            dim=16,
            num_layers=leg.get("layers", 2),
            num_heads=2,
            ffn_dim=24,
            head_dim=8,
            rope_dim=4,
            kv_rank=8,
            init_std=0.1,
            num_experts=EXPERTS,
            num_active_experts=2,
            num_shared_experts=leg.get("shared", 1),
            num_dense_layers=1,
        )
    network.to(getattr(torch, leg.get("dtype", "float64")))  # float64: rounding hides nothing
    if leg.get("skewed"):  # the first experts get no token, whatever the data
        _skew(network)
    recipe = RECIPES[leg.get("recipe", "sgd")](
        lr=leg.get("lr", 0.1), weight_decay=0.1, eps=1e-8, schedule="constant"
    )
    compiled = leg.get("compile", False)
    return Watched(network, recipe, compile=compiled, recompute=leg.get("recompute", "off"))


def _skew(network: Transformer) -> None:
    """Keep experts from being chosen: the half of them that the first processes hold, and one."""
    for module in network.modules():
        if isinstance(module, MixtureOfExperts):
            reset = module.balance.reset_parameters

            def skewed(balance: Any = module.balance, reset: Any = reset) -> None:
                reset()
                balance.bias[: EXPERTS // 2] = -10
                balance.bias[-1] = -10

            module.balance.reset_parameters = skewed  # type: ignore[method-assign]
            if not module.balance.bias.is_meta:
                skewed()


def break_off(how: str) -> None:
    """Have this process end, or hang, as the others wait for its copies in the fifth exchange."""
    begin, calls = _Way.begin, itertools.count(1)

    def breaking(*args: Any, **kwargs: Any) -> None:
        if next(calls) == 5:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        begin(*args, **kwargs)

    _Way.begin = breaking  # type: ignore[method-assign]


def run(leg: dict[str, Any], output: Path) -> None:
    model = build(leg)
    if "breaks" in leg and int(os.environ.get("LOCAL_RANK", "0")) == 1:
        break_off(leg["breaks"])
    strategy = STRATEGIES[leg["strategy"]](**leg.get("layout", {}))
    folder = output / leg.get("folder", leg["name"])
    saving = leg.get("save")
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=[RunCheckpoint(folder, **{"every_n_steps": 2, **saving})] if saving else [],
        accelerator="cpu",
        devices=leg.get("devices", 1),
        strategy=strategy,
        precision=leg.get("precision"),
        max_steps=leg.get("steps", 5),
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=0.5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(saving),
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    resume = leg.get("resume")
    replicas = layout_of(strategy).data_parallel_size
    generator = torch.Generator().manual_seed(1)
    tokens = (torch.rand(20, SEQUENCES // ACCUMULATED, 9, generator=generator) ** 2 * 40).long()
    share = tokens.unflatten(1, (replicas, -1))
    sharing = getattr(strategy, "expert_parallel_size", 1)
    ranks = ranks_of(replicas, trainer.world_size // replicas, sharing)
    share = share[:, (ranks == trainer.global_rank).any(1)].squeeze(1)
    share = share[leg.get("start", 0) * ACCUMULATED :].flatten(0, 1)
    loader = DataLoader(share, batch_size=SEQUENCES // ACCUMULATED // replicas)
    trainer.fit(
        model, loader, ckpt_path=(folder / resume).resolve() if resume else None, weights_only=False
    )
    state = trainer.strategy.lightning_module_state_dict()
    optimizer = trainer.strategy.optimizer_state(trainer.optimizers[0])
    held: Any = [m.gate_up for m in model.modules() if isinstance(m, MixtureOfExperts)]
    parts = [h.to_local() if isinstance(h, DTensor) else h for h in held]
    gradients: list[Any] = [model.gradients]
    if trainer.world_size > 1:  # of all stages
        gradients = trainer.world_size * [None]
        torch.distributed.all_gather_object(gradients, model.gradients)
    if trainer.is_global_zero:
        every = {name: grad for part in gradients for name, grad in part.items()}
        seen = {
            "rows": model.rows,
            "state": state,
            "optimizer": optimizer["state"],
            "gradients": {name: every[name] for name in state if name in every},
            "loads": torch.stack(model.loads),
            "held": [len(part) for part in parts],
        }
        torch.save(seen, output / f"{leg['name']}.pt")


if __name__ == "__main__":
    for leg in json.loads(sys.argv[1]):
        run(leg, Path(sys.argv[2]))
