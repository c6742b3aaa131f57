"""Optimizer recipes: their settings, parameter groups and checks."""

from collections.abc import Callable

import pytest
import torch

from mhc_lightning.errors import UserError
from mhc_lightning.modules import (
    HyperConnection,
    IdentityHyperConnection,
    ManifoldHyperConnection,
    Transformer,
)
from mhc_lightning.optimizers.recipes import AdamWRecipe, MuonRecipe, OptimizerRecipe


@pytest.mark.parametrize(
    "build", [ManifoldHyperConnection, HyperConnection, IdentityHyperConnection]
)
def test_biases_and_gates_do_not_decay(build: type) -> None:
    connection = build(8, 4, 0)
    decayed, free = AdamWRecipe(lr=1.0).parameter_groups(connection.parameters())
    assert [p is connection.phi for p in decayed["params"]] == [True]
    assert {id(p) for p in free["params"]} == {id(connection.alpha), id(connection.bias)}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_left_out() -> None:
    layer = torch.nn.Linear(3, 3)
    layer.bias.requires_grad_(False)
    groups = AdamWRecipe(lr=1.0).parameter_groups(layer.parameters())
    assert [len(group["params"]) for group in groups] == [1, 0]


def test_defaults_are_the_papers() -> None:
    optimizer, _ = AdamWRecipe(lr=4e-4).build(torch.nn.Linear(2, 2), 10)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-20, 0.1)


def test_bad_values() -> None:
    for lr in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"optimizer.lr must be a positive number"):
            AdamWRecipe(lr=lr)
    for recipe, name in ((AdamWRecipe, "eps"), (MuonRecipe, "update_rms")):
        for value in (0.0, -1.0, float("nan"), float("inf"), *([1e-60] if name == "eps" else [])):
            with pytest.raises(UserError, match=rf"optimizer.{name} must be a positive number"):
                recipe(lr=1.0, **{name: value})  # type: ignore[arg-type]
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        for name in ("memory_lr_scale", "connection_lr_scale"):
            with pytest.raises(UserError, match=rf"optimizer.{name} must be a positive number"):
                AdamWRecipe(lr=1.0, **{name: scale})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"optimizer.memory_update must be adam or rowwise"):
        MuonRecipe(lr=1.0, memory_update="sgd")  # type: ignore[arg-type]
    for name in ("weight_decay", "final_fraction"):
        for value in (-0.1, float("nan"), float("inf")):
            with pytest.raises(UserError, match=rf"optimizer.{name} must be at least 0"):
                AdamWRecipe(lr=1.0, **{name: value})  # type: ignore[arg-type]
    for value in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"optimizer.momentum must be from 0 to below 1"):
            MuonRecipe(lr=1.0, momentum=value)
    with pytest.raises(UserError, match=r"optimizer.schedule must be step, cosine or constant"):
        AdamWRecipe(lr=1.0, schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"optimizer.warmup_steps"):
        AdamWRecipe(lr=1.0, warmup_steps=-1)


@pytest.mark.parametrize(
    "recipe", [AdamWRecipe(lr=1e-3), MuonRecipe(lr=1e-3)], ids=["AdamW", "Muon"]
)
def test_parameters_too_coarse_for_their_updates_are_said_to_be(
    recipe: OptimizerRecipe, recwarn: pytest.WarningsRecorder
) -> None:
    """What it says is so: a norm weight of 1 loses updates of 1e-3, and any below the part."""
    dtype, part = torch.bfloat16, 512
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).to(dtype)
    network[0].bias.requires_grad_(False)
    recipe.build(network, 10)
    (said,) = {str(warning.message) for warning in recwarn.list}
    recwarn.clear()
    assert "3 of 3 trained parameters are bfloat16" in said and f"below 1/{part} of" in said
    assert "trainer.precision=bf16-mixed" in said
    lost = torch.rand(100) + 1
    assert torch.equal((lost.to(dtype) * (1 - 0.99 / part)).to(dtype), lost.to(dtype))
    assert torch.tensor(1.0).to(dtype) * (1 - 1.01 / part) < 1
    for dtype in (torch.float32, torch.float64):
        recipe.build(torch.nn.Linear(4, 4, dtype=dtype), 10)
    recipe.build(torch.nn.Sequential(torch.nn.Linear(4, 4), frozen_half()), 10)
    assert not recwarn.list


def frozen_half() -> torch.nn.Module:
    return torch.nn.Linear(4, 4).bfloat16().requires_grad_(False)


@pytest.mark.parametrize(
    "recipe", [AdamWRecipe(lr=1e-3), MuonRecipe(lr=1e-3)], ids=["AdamW", "Muon"]
)
def test_float16_parameters_are_refused_because_their_moments_vanish(
    recipe: OptimizerRecipe,
) -> None:
    layer = torch.nn.Linear(4, 4, dtype=torch.float16)
    with pytest.raises(UserError, match=r"2 of 2 trained parameters are float16.*bf16-mixed"):
        recipe.build(layer, 10)
    recipe.build(torch.nn.Sequential(layer.requires_grad_(False), torch.nn.Linear(4, 4)), 10)
    # What it says is so: the second moment of such a gradient is zero, and so is eps.
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    weight.grad = torch.full_like(weight, 2e-4)
    torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.95), eps=1e-20).step()
    assert not weight.isfinite().any()


class Adapter(torch.nn.Module):
    """A low-rank adapter, which has no weight of its own."""

    def __init__(self, base: torch.nn.Module, rows: int, columns: int) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(columns, 2, bias=False)
        self.up = torch.nn.Linear(2, rows, bias=False)


@pytest.mark.parametrize("change", ["none", "adapters", "tied", "bias"])
def test_muon_takes_no_table_whatever_stands_in_its_place(
    tiny_transformer: Callable[..., Transformer], change: str
) -> None:
    network = tiny_transformer()
    inner = {id(p) for p in network.blocks.parameters() if p.dim() > 1}
    size, dim = network.vocab_size, network.embedding.weight.shape[1]
    if change == "adapters":
        network.embedding = Adapter(network.embedding, size, dim)  # type: ignore[assignment]
        network.output = Adapter(network.output, size, dim)  # type: ignore[assignment]
    elif change == "tied":
        network.output.weight = network.embedding.weight
    elif change == "bias":
        network.output = torch.nn.Linear(dim, size)
    muon, tables, vectors = MuonRecipe(lr=1.0).build_optimizer(network).param_groups
    assert {id(p) for p in muon["params"]} == inner
    outer = [*network.embedding.parameters(), *network.output.parameters()]
    assert {id(p) for p in tables["params"]} == {id(p) for p in outer if p.dim() > 1}
    assert sum(len(g["params"]) for g in (muon, tables, vectors)) == len([*network.parameters()])
    kept = {p: MuonRecipe(lr=1.0).state_per_value(network, p) for p in network.parameters()}
    assert {id(p) for p, count in kept.items() if count == 1} == inner


def test_muon_leaves_tables_and_kernels_of_other_modules_to_adamw() -> None:
    parts = {
        "conv": torch.nn.Conv2d(2, 4, 3),
        "up": torch.nn.ConvTranspose1d(2, 4, 3),
        "positions": torch.nn.Embedding(5, 4),
        "bag": torch.nn.EmbeddingBag(5, 4),
        "attention": torch.nn.MultiheadAttention(4, 2),
        "linear": torch.nn.Linear(4, 4),
    }
    muon, tables, _ = MuonRecipe(lr=1.0).build_optimizer(torch.nn.ModuleDict(parts)).param_groups
    names = {p: name for name, p in torch.nn.ModuleDict(parts).named_parameters()}
    assert {names[p] for p in muon["params"]} == {
        "attention.in_proj_weight", "attention.out_proj.weight", "linear.weight"
    }  # fmt: skip
    assert {names[p] for p in tables["params"]} == {
        "conv.weight", "up.weight", "positions.weight", "bag.weight"
    }  # fmt: skip
