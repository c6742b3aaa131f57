"""The optimizer recipe: groups and schedule."""

import pytest
import torch

from mhc_lightning.errors import UserError
from mhc_lightning.modules import (
    HyperConnection,
    IdentityHyperConnection,
    ManifoldHyperConnection,
)
from mhc_lightning.optimization import AdamW, Muon


def test_step_schedule_of_the_paper() -> None:
    recipe = AdamW(lr=8.6e-4, warmup_steps=2000)
    total = 30_000
    assert recipe.factor(0, total) == 1 / 2000
    assert recipe.factor(999, total) == 0.5
    assert recipe.factor(1999, total) == 1.0
    assert recipe.factor(23_999, total) == 1.0
    assert recipe.factor(24_000, total) == 0.316
    assert recipe.factor(26_999, total) == 0.316
    assert recipe.factor(27_000, total) == 0.1
    assert recipe.factor(29_999, total) == 0.1


def test_cosine_and_constant() -> None:
    cosine = AdamW(lr=1.0, warmup_steps=10, schedule="cosine", final_fraction=0.2)
    assert cosine.factor(10, 110) == 1.0
    assert cosine.factor(60, 110) == pytest.approx(0.6)
    assert cosine.factor(110, 110) == pytest.approx(0.2)
    assert AdamW(lr=1.0, schedule="constant").factor(10**6, 10) == 1.0


@pytest.mark.parametrize(
    "build", [ManifoldHyperConnection, HyperConnection, IdentityHyperConnection]
)
def test_biases_and_gates_do_not_decay(build: type) -> None:
    connection = build(8, 4, 0)
    decayed, free = AdamW(lr=1.0).parameter_groups(connection.parameters())
    assert [p is connection.phi for p in decayed["params"]] == [True]
    assert {id(p) for p in free["params"]} == {id(connection.alpha), id(connection.bias)}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_left_out() -> None:
    layer = torch.nn.Linear(3, 3)
    layer.bias.requires_grad_(False)
    groups = AdamW(lr=1.0).parameter_groups(layer.parameters())
    assert [len(group["params"]) for group in groups] == [1, 0]


def test_defaults_are_the_papers() -> None:
    optimizer, _ = AdamW(lr=4e-4).build(torch.nn.Linear(2, 2), 10)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-20, 0.1)


def test_bad_values() -> None:
    for lr in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"optimizer.lr must be a positive number"):
            AdamW(lr=lr)
    for recipe, name in ((AdamW, "eps"), (Muon, "update_rms")):
        for value in (0.0, -1.0, float("nan"), float("inf"), *([1e-60] if name == "eps" else [])):
            with pytest.raises(UserError, match=rf"optimizer.{name} must be a positive number"):
                recipe(lr=1.0, **{name: value})  # type: ignore[arg-type]
    for name in ("weight_decay", "final_fraction"):
        for value in (-0.1, float("nan"), float("inf")):
            with pytest.raises(UserError, match=rf"optimizer.{name} must be at least 0"):
                AdamW(lr=1.0, **{name: value})  # type: ignore[arg-type]
    for value in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"optimizer.momentum must be from 0 to below 1"):
            Muon(lr=1.0, momentum=value)
    with pytest.raises(UserError, match=r"optimizer.schedule must be step, cosine or constant"):
        AdamW(lr=1.0, schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"optimizer.warmup_steps"):
        AdamW(lr=1.0, warmup_steps=-1)


@pytest.mark.parametrize("recipe", [AdamW(lr=1e-3), Muon(lr=1e-3)], ids=["AdamW", "Muon"])
def test_parameters_too_coarse_for_their_updates_are_said_to_be(
    recipe: AdamW, recwarn: pytest.WarningsRecorder
) -> None:
    """What it says is so: a norm weight of 1 loses updates of 1e-3, and any below the part."""
    for dtype, part in ((torch.bfloat16, 512), (torch.float16, 4096)):
        network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).to(dtype)
        network[0].bias.requires_grad_(False)
        recipe.build(network, 10)
        (said,) = {str(warning.message) for warning in recwarn.list}
        recwarn.clear()
        name = str(dtype).removeprefix("torch.")
        assert f"3 of 3 trained parameters are {name}" in said and f"below 1/{part} of" in said
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
