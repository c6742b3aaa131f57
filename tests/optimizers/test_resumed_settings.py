"""The settings of an optimizer whose state was loaded."""

import pytest
import torch

from mhc_lightning.optimizers.recipes import AdamWRecipe, MuonRecipe, OptimizerRecipe
from mhc_lightning.optimizers.resumed_settings import group_settings, keep_present_settings


@pytest.mark.parametrize(
    ("before", "now", "steps"),
    [
        (AdamWRecipe(lr=1.0), AdamWRecipe(lr=1.0), (10, 100)),
        (AdamWRecipe(lr=1.0), AdamWRecipe(lr=1.0, warmup_steps=20), (100, 100)),
        (
            AdamWRecipe(lr=1.0, schedule="cosine"),
            AdamWRecipe(lr=1.0, schedule="constant"),
            (20, 20),
        ),
        (MuonRecipe(lr=1.0, schedule="cosine"), MuonRecipe(lr=0.5, schedule="cosine"), (20, 40)),
        (MuonRecipe(lr=1.0), MuonRecipe(lr=1.0), (10, 10)),
    ],
)
def test_the_first_step_after_a_resume_has_the_learning_rate_of_the_schedule_of_now(
    before: OptimizerRecipe, now: OptimizerRecipe, steps: tuple[int, int]
) -> None:
    (optimizer, scheduler), (other, other_scheduler) = (
        recipe.build(torch.nn.Linear(2, 2), total)
        for recipe, total in zip((before, now), steps, strict=True)
    )
    for _ in range(9):
        optimizer.step()
        scheduler.step()
    settings = group_settings(other)
    other.load_state_dict(optimizer.state_dict())
    other_scheduler.load_state_dict(scheduler.state_dict())
    changed = keep_present_settings(settings, other, other_scheduler)
    same = (before, steps[0]) == (now, steps[1])
    assert bool(changed) != same
    for step in range(9, 15):
        wanted = now.lr * now.learning_rate.factor(step, steps[1])
        assert {group["lr"] for group in other.param_groups} == {wanted}
        assert set(other_scheduler.get_last_lr()) == {wanted}
        other.step()
        other_scheduler.step()
