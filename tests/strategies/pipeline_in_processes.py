"""Trains a tiny model once per case and saves what it saw; started by torchrun or alone."""

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from recorded_streams import recorded
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.callbacks import AmaxGain, StreamDiversity
from mhc_lightning.callbacks.stream_sampler import StreamSampler
from mhc_lightning.modules import (
    ManifoldHyperConnection,
    SinglePassHyperConnection,
    Transformer,
)
from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.strategies import PipelineStrategy
from mhc_lightning.strategies.layout import layout_of

SEQUENCES = 16  # per optimizer step


class Sgd(AdamWRecipe):
    """Parameters under Adam cannot be compared: it divides by gradients that are all rounding."""

    def build_optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameter_groups(module.parameters()), lr=self.lr)


class Watched(LanguageModel):
    """Keeps losses and gradient norms of every step, and all gradients of the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: list[dict[str, float]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.fault, self.culprit = "", 0

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if not self.gradients:
            for name, parameter in self.named_parameters():
                grad = parameter.grad
                whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                self.gradients[name] = whole.clone()
        super().configure_gradient_clipping(*args, **kwargs)

    def on_train_batch_end(self, *_: object) -> None:
        metrics = self.trainer.callback_metrics
        if self.trainer.global_step > len(self.rows):
            tags = [t for t in metrics if t.startswith(("train/", "experts/"))]
            self.rows.append({tag: float(metrics[tag]) for tag in tags})
            callbacks: list[pl.Callback] = getattr(self.trainer, "callbacks")  # noqa: B009
            for callback in callbacks:
                if isinstance(callback, StreamSampler):
                    self.rows[-1].update(callback.last)

    def on_train_batch_start(self, *_: object) -> None:
        if self.fault and (self.trainer.global_step, self.trainer.global_rank) == (2, self.culprit):
            if self.fault == "raise":
                raise ArithmeticError("out of luck")
            if self.fault == "hang":
                for block in self.model.blocks:
                    block.register_forward_pre_hook(oversleep)
            else:
                os.kill(os.getpid(), signal.Signals[self.fault])

    def on_validation_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.rows[-1]["val/loss"] = float(metrics["val/loss"])


def oversleep(*_: object) -> None:
    time.sleep(3600)


def build(case: dict[str, Any]) -> Watched:
    pl.seed_everything(0, verbose=False)
    with torch.device("meta" if case.get("meta") else "cpu"):
        network = Transformer(
            connection=SinglePassHyperConnection
            if case.get("single_pass")
            else ManifoldHyperConnection,
            vocab_size=40,
            dim=16,
            num_layers=8,
            num_heads=2,
            ffn_dim=24,
            head_dim=8,
            rope_dim=4,
            kv_rank=8,
            init_std=0.1,
            num_experts=4 if case.get("experts") else 0,
            num_active_experts=2,
            num_shared_experts=1,
        )
    if "precision" not in case:
        network.double()  # rounding hides nothing
    optimizer = Sgd(lr=0.1, weight_decay=0.0, schedule="constant")
    return Watched(network, optimizer, recompute=case.get("recompute", "off"))


def run(case: dict[str, Any], output: Path) -> None:
    # A stage border rounds a gradient to bfloat16 that fused kernels keep in float32.
    os.environ["MHC_LIGHTNING_KERNELS"] = "torch" if "precision" in case else "auto"
    model = build(case)
    model.fault, model.culprit = case.get("fault", ("", 0))
    layout = case.get("strategy")
    strategy = PipelineStrategy(**layout) if layout else SingleDeviceStrategy(torch.device("cpu"))
    accumulate = 2
    watching: list[pl.Callback] = [AmaxGain(1), StreamDiversity(1)] if case.get("watched") else []
    trainer = pl.Trainer(
        callbacks=watching,
        accelerator="cpu",
        devices=case.get("devices", 1),
        num_nodes=case.get("nodes", 1),
        precision=case.get("precision", "32-true"),
        strategy=strategy,
        max_steps=5,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        val_check_interval=4,
        check_val_every_n_epoch=None,
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 40, (5 * accumulate, SEQUENCES // accumulate, 9), generator=generator)
    # Frequent tokens come first, so that there is something to learn and gradients are clipped.
    tokens = (tokens * torch.rand(tokens.shape, generator=generator) ** 2).long()
    if case.get("padded"):  # sequences of all lengths, also of none
        lengths = torch.randint(0, 10, tokens.shape[:2], generator=generator)
        tokens[torch.arange(9) >= lengths[..., None]] = -100
    replicas = layout_of(strategy).data_parallel_size
    replica = trainer.global_rank // (trainer.world_size // replicas)
    share = tokens.unflatten(1, (replicas, -1))[:, replica].flatten(0, 1)
    size = SEQUENCES // accumulate // replicas
    loaders = [DataLoader(share, batch_size=size) for _ in range(2)]
    with recorded(strategy) if case.get("recorded") else nullcontext() as record:
        trainer.fit(model, loaders[0], DataLoader(share[: 2 * size], batch_size=size))
    state = trainer.strategy.lightning_module_state_dict()
    gradients = [model.gradients]
    if layout:
        gradients = [{} for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(gradients, model.gradients)
    records: list[Any] = [None] * trainer.world_size
    if case.get("recorded"):
        torch.distributed.all_gather_object(records, record)
    if trainer.is_global_zero:
        every = {name: grad for part in gradients for name, grad in part.items()}
        seen = {"rows": model.rows, "state": state, "gradients": every, "records": records}
        torch.save(seen, output)


if __name__ == "__main__":
    for name, case in json.loads(sys.argv[1]).items():
        run(case, Path(sys.argv[2]) / f"{name}.pt")
