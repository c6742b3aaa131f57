"""A LanguageModel trains the tables of a memory by the rows that a step touches."""

import itertools
import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import networks
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mhc_lightning import LanguageModel
from mhc_lightning.callbacks.alarm.update_control import UpdateGuard
from mhc_lightning.errors import NonFiniteLossError, UserError
from mhc_lightning.modules import Engram, NgramTable, OverEncoding
from mhc_lightning.optimizers import AdamWRecipe, MuonRecipe
from mhc_lightning.optimizers.finiteness import non_finite
from mhc_lightning.strategies.row_stores import leave_tables_to_stores

STEPS, ACCUMULATED = 4, 2
MEMORIES: dict[str, Any] = {
    "engram": partial(Engram, rows=50, dim=8, num_heads=2, layers=[1], zero_start=False),
    "over_encoding": partial(OverEncoding, rows=67, dim=8, num_heads=2),
}
RECIPES: dict[str, Any] = {"adamw": AdamWRecipe, "muon": MuonRecipe}


class Watched(LanguageModel):
    """Keeps what each optimizer step logs, and whether the table's gradient is sparse."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self.seen: list[Any] = []

    def on_train_batch_end(self, *_: object) -> None:
        if self.trainer.fit_loop.epoch_loop.batch_idx % ACCUMULATED == 1:
            metrics = self.trainer.callback_metrics
            grad = table_of(self).weight.grad
            sparse = None if grad is None else grad.is_sparse
            self.seen.append(
                (float(metrics["train/loss"]), float(metrics["train/grad_norm"]), sparse)
            )


class Dense(Watched):
    """A subclass with optimizers of its own: its tables have ordinary gradients."""

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()


def table_of(module: torch.nn.Module) -> NgramTable:
    (table,) = [part for part in module.modules() if isinstance(part, NgramTable)]
    return table


def build(memory: str = "engram", recipe: str = "adamw", kind: Any = Watched, **more: Any) -> Any:
    network = networks.tiny_transformer("mhc", memory=MEMORIES[memory]).double()
    network.memory.bind(np.arange(40), 0)
    settings = {"lr": 1e-2, "eps": 1e-8, "schedule": "constant", **more}
    return kind(network, RECIPES[recipe](**settings))


def fit(model: Any, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": STEPS,
            "accumulate_grad_batches": ACCUMULATED,
            "gradient_clip_val": 0.5,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            **settings,
        }
    )
    generator = torch.Generator().manual_seed(1)
    tokens: Any = torch.randint(0, 40, (STEPS * ACCUMULATED * 4, 9), generator=generator)
    trainer.fit(model, DataLoader(tokens, batch_size=4))
    return trainer


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_row_gradients_train_as_ordinary_ones_do(memory, recipe, clip):
    """Losses, the norm of all gradients, clipped either way, and all parameters."""
    ours, theirs = build(memory, recipe), build(memory, recipe, Dense)
    limit = 0.5 if clip == "norm" else 1e-3
    for model in (ours, theirs):
        fit(model, gradient_clip_algorithm=clip, gradient_clip_val=limit)
    assert [sparse for *_, sparse in ours.seen] == [True] * STEPS
    assert [sparse for *_, sparse in theirs.seen] == [False] * STEPS
    for mine, other in zip(ours.seen, theirs.seen, strict=True):
        assert mine[:2] == pytest.approx(other[:2], rel=1e-12)
    assert ours.seen[0][1] > 0.5
    weights = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-9, msg=name)


def test_tables_have_a_learning_rate_of_their_own_and_no_decay():
    model = build(memory_lr_scale=3.0, warmup_steps=2)
    rates: list[tuple[float, float]] = []
    groups = lambda: model.trainer.optimizers[0].param_groups  # noqa: E731
    model.on_before_optimizer_step = lambda _: rates.append((groups()[0]["lr"], groups()[-1]["lr"]))
    trainer = fit(model)
    rows = trainer.optimizers[0].param_groups[-1]
    assert [id(p) for p in rows["params"]] == [id(table_of(model).weight)]
    assert rows["weight_decay"] == 0
    want = [(5e-3, 1.5e-2), *[(1e-2, 3e-2)] * 3]
    assert rates == [pytest.approx(pair) for pair in want]


def test_muon_never_sees_a_table():
    model = build(recipe="muon")
    groups = fit(model).optimizers[0].param_groups
    table = table_of(model).weight
    where = [any(p is table for p in group["params"]) for group in groups]
    assert where == [False, False, False, True]
    assert [group["muon"] for group in groups] == [True, False, False, False]
    others = {id(p) for group in groups[:3] for p in group["params"]}
    assert others == {id(p) for p in model.parameters() if p is not table}


def test_rows_that_no_step_touches_keep_their_values():
    model = build()
    before = table_of(model).weight.detach().clone()
    trainer = fit(model)
    table = table_of(model).weight
    state = trainer.optimizers[0].state[table]
    moved = (table != before).any(1).nonzero()[:, 0].tolist()
    assert 0 < len(moved) < len(table)
    assert sorted(state["rows"].tolist()) == moved


def test_after_a_fit_a_table_has_an_ordinary_gradient():
    model = build()
    fit(model)
    assert table_of(model).store is None
    tokens = torch.randint(0, 40, (2, 8))
    model.model.loss(tokens, tokens).backward()
    grad = table_of(model).weight.grad
    assert grad is not None and not grad.is_sparse


def test_ddp_leaves_tables_and_the_constants_of_hashes_alone():
    model = build()
    leave_tables_to_stores(model)
    left = set(model._ddp_params_and_buffers_to_ignore)
    constants = {f"model.memory.hash.{name}" for name, _ in model.model.memory.hash.named_buffers()}
    assert left == {"model.blocks.1.memory.table.weight", *constants}
    assert "model.memory.hash.classes" in constants
    leave_tables_to_stores(model, False)
    assert not model._ddp_params_and_buffers_to_ignore


def test_frozen_rows_keep_their_values():
    model = build()
    table_of(model).weight.requires_grad_(False)
    before = table_of(model).weight.clone()
    trainer = fit(model)
    assert torch.equal(table_of(model).weight, before)
    assert [len(group["params"]) > 0 for group in trainer.optimizers[0].param_groups] == [
        True,
        True,
        False,
    ]


def test_a_gradient_of_rows_that_is_not_finite_stops_the_run():
    """Before anything has changed; the loss is finite still."""
    model = build()
    weight: Any = table_of(model).weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.on_after_backward = lambda: weight.row_store._parts[0]._values()[0, 0].fill_(math.inf)
    with pytest.raises(NonFiniteLossError, match="the gradient became infinite"):
        fit(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_skipped_update_leaves_rows_and_their_state_alone():
    model, tables, steps = build(), [], []

    def keep(*_: object) -> None:
        (optimizer,) = model.trainer.optimizers
        if model.trainer.fit_loop.epoch_loop.batch_idx % ACCUMULATED == 1:
            tables.append(table_of(model).weight.detach().clone())
            steps.append(int(optimizer.state[table_of(model).weight]["step"].sum()))

    model.on_train_batch_end = keep
    UpdateGuard(lambda failure: model.trainer.global_step == 1, lambda: 1.0).install(model)
    fit(model)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(tables)] == [
        True,
        False,
        False,
    ]
    assert steps[0] == steps[1] < steps[2] < steps[3]


def test_state_of_rows_that_is_not_finite_is_found():
    model = build()
    trainer = fit(model)
    state = trainer.optimizers[0].state[table_of(model).weight]
    assert non_finite(model, trainer.optimizers) == []
    state["exp_avg"][1, 0] = float("nan")
    (found,) = non_finite(model, trainer.optimizers)
    assert str(found).startswith("the optimizer's exp_avg of model.blocks.1.memory.table.weight")


def test_state_of_another_kind_of_memory_update_is_refused():
    saved = fit(build()).optimizers[0].state_dict()
    model = build(memory_update="rowwise")
    optimizer, _ = model.optimizer.build(model, STEPS)
    with pytest.raises(UserError, match=r"optimizer\.memory_update"):
        optimizer.load_state_dict(saved)
