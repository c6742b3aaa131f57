"""The recipes' optimizers do what every torch optimizer does, in anybody's hands."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)

from mhc_lightning.optimizers.muon import MuonAdamW
from mhc_lightning.optimizers.recipes import AdamWRecipe, MuonRecipe, OptimizerRecipe

RECIPES = [AdamWRecipe(lr=1e-2), MuonRecipe(lr=1e-2)]
Network = nn.Sequential


def network(dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def set_grads(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = grad.to(parameter.dtype)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        set_grads(model, step)
        optimizer.step()


def values(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def through_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("recipe", RECIPES, ids=["AdamW", "Muon"])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_copy_goes_on_by_itself(recipe: OptimizerRecipe, way: str, steps: int) -> None:
    """Model, optimizer and scheduler together, before the first step and after some."""
    model = network()
    optimizer, scheduler = recipe.build(model, 10)
    train(model, optimizer, range(steps))
    if steps:
        scheduler.step()
    other, twin, schedule = COPIES[way]((model, optimizer, scheduler))
    assert torch.equal(values(other), values(model))
    train(other, twin, range(steps, 6))
    schedule.step()
    assert not torch.equal(values(other), values(model))
    train(model, optimizer, range(steps, 6))
    assert torch.equal(values(other), values(model))
    assert schedule.last_epoch == scheduler.last_epoch + 1 == bool(steps) + 1


@pytest.mark.parametrize("recipe", RECIPES, ids=["AdamW", "Muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_goes_into_a_fresh_optimizer(recipe: OptimizerRecipe, dtype: torch.dtype) -> None:
    """Of the same dtype bit for bit; of another, cast to it."""
    model, fresh = network(), network(dtype)
    optimizer, other = recipe.build_optimizer(model), recipe.build_optimizer(fresh)
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 5e-3
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 5e-3
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        for name, value in optimizer.state[ours].items():
            found = other.state[theirs][name]
            assert found.dtype == (dtype if name != "step" else torch.float32)
            assert torch.equal(found, value.to(found.dtype))
    train(model, optimizer, range(3, 6))
    train(fresh, other, range(3, 6))
    if dtype == torch.float32:
        assert torch.equal(values(fresh), values(model))
    else:
        torch.testing.assert_close(values(fresh).float(), values(model), rtol=0.05, atol=0.02)


def test_state_of_before_groups_had_all_settings_is_taken() -> None:
    """Groups of Muon had none of AdamW's."""
    models = network(), network()
    optimizers = [MuonRecipe(lr=1e-2).build_optimizer(model) for model in models]
    train(models[0], optimizers[0], range(2))
    saved = copy.deepcopy(optimizers[0].state_dict())
    for name in ("betas", "eps", "fused"):
        del saved["param_groups"][0][name]
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(saved)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2, 4))
    assert torch.equal(values(models[0]), values(models[1]))


@pytest.mark.parametrize("recipe", RECIPES, ids=["AdamW", "Muon"])
@pytest.mark.parametrize("after", [0, 2])
def test_parameters_added_later_are_trained_as_if_there_from_the_start(
    recipe: OptimizerRecipe, after: int
) -> None:
    model, reference = nn.ParameterList(), nn.ParameterList()
    for parameters in (model, reference):
        torch.manual_seed(2)
        parameters.extend(
            nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (3,), (5, 4), (5,))
        )
    optimizer = recipe.build_optimizer(nn.ParameterList(list(model)[:2]))
    train(model, optimizer, range(after))
    for parameter in list(model)[2:]:
        optimizer.add_param_group(
            {"params": [parameter], "weight_decay": 0.0, "muon": parameter.dim() > 1, "lr": 1e-3}
        )
    train(model, optimizer, range(after, 4))
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model)

    early, late = list(reference)[:2], list(reference)[2:]
    train(reference, recipe.build_optimizer(nn.ParameterList(early)), range(4))
    alone = type(recipe)(lr=1e-3, weight_decay=0.0)
    train(reference, alone.build_optimizer(nn.ParameterList(late)), range(after, 4))
    assert torch.equal(values(model), values(reference))


def test_a_group_that_does_not_say_is_adamws() -> None:
    """As callbacks that unfreeze layers add them."""
    weights = [nn.Parameter(torch.ones(3, 3)) for _ in range(3)]
    optimizer = MuonAdamW([{"params": weights[:1], "muon": True}], lr=1e-2)
    optimizer.add_param_group({"params": weights[1]})
    reference = torch.optim.AdamW(
        weights[2:], lr=1e-2, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.1, fused=True
    )
    for step in range(3):
        for weight in weights:
            weight.grad = torch.full((3, 3), 1.0 + step)
        optimizer.step()
        reference.step()
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adamw_beside_muon_is_torchs(fused: bool, dtype: torch.dtype) -> None:
    model, reference = network(dtype), network(dtype)
    settings: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.2, "fused": fused}
    train(model, MuonAdamW([{"params": model.parameters(), "muon": False}], **settings), range(4))
    theirs = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.95), eps=1e-20, **settings)
    train(reference, theirs, range(4))
    assert torch.equal(values(model), values(reference))


SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=8),
    "cyclic": lambda optimizer: CyclicLR(optimizer, 0.01, 0.1, step_size_up=2),
    "restarts": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 3),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=["AdamW", "Muon"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers_of_others_reach_every_group(recipe: OptimizerRecipe, schedule: str) -> None:
    model = network()
    optimizer = recipe.build_optimizer(model)
    scheduler = SCHEDULES[schedule](optimizer)
    rates = set()
    for step in range(6):
        before = values(model)
        train(model, optimizer, range(step, step + 1))
        assert not torch.equal(values(model), before)
        rates.add(optimizer.param_groups[0]["lr"])
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        scheduler.step(*([1.0] if schedule == "plateau" else []))  # type: ignore[arg-type]
    assert len(rates) > 1


@pytest.mark.parametrize("recipe", RECIPES, ids=["AdamW", "Muon"])
def test_closures_hooks_and_missing_gradients(recipe: OptimizerRecipe) -> None:
    model, calls = network(), list[str]()
    optimizer = recipe.build_optimizer(model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    frozen = model.get_parameter("2.weight")
    before = frozen.detach().clone()

    def closure() -> Any:
        calls.append("closure")
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().mean()
        loss.backward()
        frozen.grad = None
        return loss

    losses = [optimizer.step(closure) for _ in range(3)]
    assert calls == 3 * ["before", "closure", "after"]
    assert losses[2] < losses[0]
    assert torch.equal(frozen, before) and frozen not in optimizer.state


def test_what_it_cannot_train_is_refused_before_anything_is_updated() -> None:
    table, matrix = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(3, 3))
    optimizer = MuonAdamW(
        [{"params": [matrix], "muon": True}, {"params": table.parameters(), "muon": False}], lr=1.0
    )
    (table(torch.tensor([1, 2])) @ matrix).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(matrix, torch.ones(3, 3)) and not optimizer.state
    for muon, parameter, words in (
        (True, torch.ones(3), r"takes matrices, not shape \(3,\)"),
        (True, torch.ones(3, 3, dtype=torch.complex64), "complex"),
        (False, torch.ones(3, dtype=torch.complex64), "complex"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.add_param_group({"params": [nn.Parameter(parameter)], "muon": muon})
    assert len(optimizer.param_groups) == 2
    for groups in ([matrix], [{"params": [matrix]}]):
        with pytest.raises(ValueError, match="parameter groups that say whose they are"):
            MuonAdamW(groups, lr=1.0)  # type: ignore[arg-type]


class Foreign(pl.LightningModule):
    """Somebody's project, with two optimizers' worth of habits and none of our recipes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.network(batch) - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() < 2]
        optimizer = MuonAdamW(
            [{"params": matrices, "muon": True}, {"params": others, "muon": False}], lr=1e-2
        )
        schedule = OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_another_project_trains_and_resumes_with_it(tmp_path: Any) -> None:
    data: Any = 8 * [torch.randn(4, 6)]

    def run(steps: int, resume: Any = None) -> tuple[Foreign, pl.Trainer]:
        module = Foreign()
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", default_root_dir=tmp_path,
                             logger=False, enable_checkpointing=False, enable_progress_bar=False,
                             enable_model_summary=False, gradient_clip_val=1.0)  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=resume)
        return module, trainer

    whole, _ = run(8)
    _, first = run(4)
    first.save_checkpoint(tmp_path / "half.ckpt")
    second, _ = run(8, tmp_path / "half.ckpt")
    assert torch.equal(values(whole.network), values(second.network))
