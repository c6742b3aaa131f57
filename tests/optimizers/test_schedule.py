"""The learning rate of every step: warm-up, step, cosine and constant."""

import pytest

from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.optimizers.schedule import Schedule


def test_step_schedule_of_the_paper() -> None:
    schedule = AdamWRecipe(lr=8.6e-4, warmup_steps=2000).learning_rate
    total = 30_000
    assert schedule.factor(0, total) == 1 / 2000
    assert schedule.factor(999, total) == 0.5
    assert schedule.factor(1999, total) == 1.0
    assert schedule.factor(23_999, total) == 1.0
    assert schedule.factor(24_000, total) == 0.316
    assert schedule.factor(26_999, total) == 0.316
    assert schedule.factor(27_000, total) == 0.1
    assert schedule.factor(29_999, total) == 0.1


def test_cosine_and_constant() -> None:
    cosine = Schedule(name="cosine", warmup_steps=10, final_fraction=0.2)
    assert cosine.factor(10, 110) == 1.0
    assert cosine.factor(60, 110) == pytest.approx(0.6)
    assert cosine.factor(110, 110) == pytest.approx(0.2)
    assert Schedule(name="constant", warmup_steps=0, final_fraction=0.1).factor(10**6, 10) == 1.0
