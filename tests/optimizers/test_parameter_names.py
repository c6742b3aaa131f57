"""An optimizer's saved state is loaded for the parameters that it is of, and for no others."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mhc_lightning.checkpoints.names import saved_checkpoints
from mhc_lightning.checkpoints.run_checkpoint import RunCheckpoint
from mhc_lightning.errors import UserError
from mhc_lightning.optimizers.recipes import AdamWRecipe, MuonRecipe, OptimizerRecipe

RECIPES = [AdamWRecipe(lr=1e-2, schedule="constant"), MuonRecipe(lr=1e-2, schedule="constant")]
# Of `network`: what a run trained, what another trains, and what tells them apart.
CHANGES = {
    "as many, of the same shapes": ("1.weight", "2.weight", ["1.weight", "2.weight"]),
    "as many, of other shapes": ("1.weight", "3.weight", ["1.weight", "3.weight"]),
    "more": ("1.weight", None, ["1.weight, which this run trains"]),
    "fewer": (None, "1.weight", ["1.weight, which this run does not train"]),
}
by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=["AdamW", "Muon"])


def network(frozen: str | None) -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6), nn.LayerNorm(6)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != frozen)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()


def same(one: dict, two: dict) -> bool:
    return all(
        torch.equal(value, two["state"][k][key])
        for k, entries in one["state"].items()
        for key, value in entries.items()
    )


@by_recipe
@pytest.mark.parametrize("change", CHANGES)
def test_state_of_other_parameters_is_refused_and_changes_nothing(
    recipe: OptimizerRecipe, change: str
) -> None:
    before, now, named = CHANGES[change]
    first, second = network(before), network(now)
    saved, _ = recipe.build(first, 10)
    optimizer, _ = recipe.build(second, 10)
    train(first, saved, 2)
    train(second, optimizer, 1)
    kept = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UserError, match="the checkpoint's optimizer is of other parameters") as e:
        optimizer.load_state_dict(saved.state_dict())
    assert all(name in str(e.value) for name in named)
    assert same(kept, optimizer.state_dict())


@by_recipe
def test_state_without_names_is_looked_at_by_shape(recipe: OptimizerRecipe) -> None:
    """As versions that saved none wrote it, and as torch writes it."""

    def nameless(model: nn.Module) -> dict:
        optimizer = recipe.build_optimizer(model)
        train(model, optimizer, 2)
        return optimizer.state_dict()

    optimizer, _ = recipe.build(network(None), 10)
    state = nameless(network(None))
    optimizer.load_state_dict(state)
    assert same(state, optimizer.state_dict())
    assert all("names" not in group for group in optimizer.param_groups)
    for frozen in ("1.weight", "3.weight"):
        with pytest.raises(UserError, match="of other parameters"):
            optimizer.load_state_dict(nameless(network(frozen)))
    other, _ = recipe.build(network("1.weight"), 10)
    with pytest.raises(UserError, match=r"\[4, 6\]|\[6, 4\]"):
        other.load_state_dict(nameless(network("3.weight")))
    with pytest.raises(UserError, match="groups"):
        other.load_state_dict({**state, "param_groups": state["param_groups"][1:]})


class Module(pl.LightningModule):
    def __init__(self, recipe: OptimizerRecipe, frozen: str | None) -> None:
        super().__init__()
        self.network, self.recipe = network(frozen), recipe

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.recipe.build(self, 10)[0]


@by_recipe
@pytest.mark.parametrize("sharded", [False, True], ids=["file", "folder"])
def test_a_run_goes_on_with_the_same_parameters_alone(
    tmp_path: Path, recipe: OptimizerRecipe, sharded: bool
) -> None:
    def run(folder: str, steps: int, frozen: str, resume: Path | None = None) -> Tensor:
        module = Module(recipe, frozen)
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=[RunCheckpoint(tmp_path / folder, every_n_steps=2, sharded=sharded)],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batch: Any = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
        data = DataLoader(batch.expand(40, 6), batch_size=2)
        trainer.fit(module, data, ckpt_path=resume, weights_only=False)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    run("a", 2, "1.weight")
    (_, saved), *_ = saved_checkpoints(tmp_path / "a")
    with pytest.raises(UserError, match=r"network\.2\.weight, which this run does not train"):
        run("a", 4, "2.weight", saved)
    assert torch.equal(run("a", 4, "1.weight", saved), run("b", 4, "1.weight"))
