"""The optimizer recipe: groups and schedule."""

import pytest
import torch

from mhc_lightning.errors import UserError
from mhc_lightning.modules import (
    HyperConnection,
    IdentityHyperConnection,
    ManifoldHyperConnection,
)
from mhc_lightning.optimization import AdamW


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
    with pytest.raises(UserError, match=r"optimizer.schedule must be step, cosine or constant"):
        AdamW(lr=1.0, schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"optimizer.warmup_steps"):
        AdamW(lr=1.0, warmup_steps=-1)
