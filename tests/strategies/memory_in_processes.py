"""Trains a tiny model with a memory in legs, each in a layout of its own; started by torchrun."""

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.distributed.tensor import DTensor
from train_in_processes import Allocations

from mhc_lightning import LanguageModel
from mhc_lightning.checkpoints.run_checkpoint import RunCheckpoint
from mhc_lightning.modules import (
    Engram,
    ManifoldHyperConnection,
    NgramTable,
    OverEncoding,
    Transformer,
    initialisation,
)
from mhc_lightning.modules.initialisation import held_rows
from mhc_lightning.modules.memory.row_store import row_store_of
from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.strategies import (
    DataParallelStrategy,
    FullyShardedStrategy,
    PipelineStrategy,
)
from mhc_lightning.strategies.layout import layout_of

ACCUMULATED = 2
SEQUENCES = 16  # per optimizer step
MEMORIES: dict[str, Any] = {
    "engram": partial(Engram, rows=50, dim=8, num_heads=2, layers=[1, 6], zero_start=False),
    "over_encoding": partial(OverEncoding, rows=67, dim=8, num_heads=2, over_decoding_weight=0.3),
}
STRATEGIES: dict[str, Any] = {
    "single": lambda **_: SingleDeviceStrategy(torch.device("cpu")),
    "ddp": DataParallelStrategy,
    "fsdp": FullyShardedStrategy,
    "pipeline": PipelineStrategy,
}


class RowSgd(torch.optim.SGD):
    """SGD that takes row gradients, too."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                store = row_store_of(parameter)
                if store is not None:
                    store.finish()
                    grad = parameter.grad
                    assert grad is not None and grad.is_sparse
                    rows, moves = grad._indices()[0], group["lr"] * grad._values()
                    part, first = held_rows(parameter.detach())
                    store.apply(partial(part.index_add_, 0, rows - first, moves, alpha=-1))
                    store.clear()
        super().step()
        return loss


class Sgd(AdamWRecipe):
    """Parameters under Adam cannot be compared: it divides by gradients that are all rounding."""

    row_gradients: ClassVar = True

    def build_optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        return RowSgd(self.parameter_groups(module.parameters()), lr=self.lr)


class Watched(LanguageModel):
    """Keeps losses and gradient norms of every step, and the first step's dense gradients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: list[dict[str, float]] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if not self.gradients:
            for name, parameter in self.named_parameters():
                grad = parameter.grad
                if grad is not None and not grad.is_sparse:
                    whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                    self.gradients[name] = whole.clone()
        super().configure_gradient_clipping(*args, **kwargs)

    def on_train_batch_end(self, *_: object) -> None:
        metrics = self.trainer.callback_metrics
        if (self.trainer.fit_loop.epoch_loop.batch_idx + 1) % ACCUMULATED == 0:
            self.rows.append(
                {tag: float(metrics[tag]) for tag in ("train/loss", "train/grad_norm")}
            )


class Peeked:
    """A loader that tells its next batch: rows of a host are fetched before they are needed."""

    def __init__(self, batches: Sequence[torch.Tensor]) -> None:
        self._batches, self._next = batches, 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for k, batch in enumerate(self._batches):
            self._next = k + 1
            yield batch

    def peek(self) -> torch.Tensor | None:
        return self._batches[self._next] if self._next < len(self) else None


def tokens_of_run(end_of_document: int | None) -> torch.Tensor:
    """[10 batches, sequences of a batch, 9]; frequent tokens come first.

    If there is a token that ends documents, it is in each sequence once, and not the last: so all
    shares of a batch have the same number of targets.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.rand(20, SEQUENCES // ACCUMULATED, 9, generator=generator) ** 2 * 40
    tokens = tokens.long()
    if end_of_document is not None:
        tokens[tokens == end_of_document] += 1
        places = torch.randint(0, 8, (*tokens.shape[:2], 1), generator=generator)
        tokens.scatter_(2, places, end_of_document)
    return tokens


def build(leg: dict[str, Any]) -> Watched:
    pl.seed_everything(0, verbose=False)
    initialisation._GROUP = 100  # values: some groups lie in several processes' parts
    with torch.device("meta" if leg.get("meta") else "cpu"):
        network = Transformer(
            connection=ManifoldHyperConnection,
            vocab_size=40,
            dim=16,
            num_layers=8,
            num_heads=2,
            ffn_dim=24,
            head_dim=8,
            rope_dim=4,
            kv_rank=8,
            init_std=0.1,
            memory=partial(MEMORIES[leg["memory"]], **leg.get("settings", {})),
        )
    network.double()  # rounding hides nothing
    if "end_of_document" in leg:
        network.memory.bind(np.arange(40), leg["end_of_document"])
        network.mask_documents(leg["end_of_document"])
    recipe = AdamWRecipe if leg.get("adam") else Sgd
    optimizer = recipe(
        lr=leg.get("lr", 0.1), weight_decay=0.0, eps=leg.get("eps", 1e-8), schedule="constant"
    )
    return Watched(network, optimizer, recompute=leg.get("recompute", "off"))


def run(leg: dict[str, Any], output: Path) -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    before = memory("VmRSS")
    with Allocations() if leg.get("counted") else nullcontext() as allocations:
        _run(leg, output, allocations, before)


def memory(entry: str) -> int:
    """The bytes that this process has in memory now (VmRSS), or has had at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{entry}:")[2].split()[0])


def _run(leg: dict[str, Any], output: Path, allocations: Allocations | None, before: int) -> None:
    model = build(leg)
    strategy = STRATEGIES[leg["strategy"]](**leg.get("layout", {}))
    folder = output / leg.get("folder", leg["name"])
    saving = leg.get("save")
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=[RunCheckpoint(folder, **{"every_n_steps": 2, **saving})] if saving else [],
        accelerator="cpu",
        devices=leg.get("devices", 1),
        strategy=strategy,
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
    tokens = tokens_of_run(leg.get("end_of_document"))
    replica = trainer.global_rank // (trainer.world_size // replicas)
    share = tokens.unflatten(1, (replicas, -1))[:, replica]
    share = share[leg.get("start", 0) * ACCUMULATED :].flatten(0, 1)
    loader = Peeked(share.split(SEQUENCES // ACCUMULATED // replicas))
    trainer.fit(
        model, loader, ckpt_path=(folder / resume).resolve() if resume else None, weights_only=False
    )
    if allocations is not None:
        tables = [m for m in model.modules() if isinstance(m, NgramTable)]
        table = max(t.weight.numel() for t in tables)
        grown = memory("VmHWM") - before
        counted = torch.tensor([allocations.largest, table, grown])
        everywhere = [torch.empty_like(counted) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(everywhere, counted)
        if trainer.is_global_zero:
            torch.save(torch.stack(everywhere), output / f"{leg['name']}.pt")
        return
    state = trainer.strategy.lightning_module_state_dict()
    gradients: list[Any] = [model.gradients]
    if trainer.world_size > 1:
        gradients = [None] * trainer.world_size
        torch.distributed.all_gather_object(gradients, model.gradients)
    if trainer.is_global_zero:
        every = {name: grad for part in gradients for name, grad in part.items()}
        state = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}
        seen = {"rows": model.rows, "state": state, "gradients": every}
        torch.save(seen, output / f"{leg['name']}.pt")


if __name__ == "__main__":
    for leg in json.loads(sys.argv[1]):
        run(leg, Path(sys.argv[2]))
