"""The curves of growing cost: what they change, and the power that is read off them."""

from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.image import imread

import growth
from mhc_lightning.modules import ManifoldHyperConnection


def test_one_thing_grows_at_a_time_by_doubling() -> None:
    for name, (what, points) in growth.CURVES.items():
        values = [point[what] for point in points]
        assert all(later == 2 * earlier for earlier, later in pairwise(values))
        for point in points:
            settings = growth.BASE | point
            tokens = settings["sequences"] * settings["length"]
            fixed = "tokens" in name and what == "length"
            assert tokens == 2048 if fixed else len(point) == 1


def test_the_power_of_the_last_doubling() -> None:
    rows = [
        {"n": 1, "a": 5.0, "b": 1.0},
        {"n": 2, "a": 2.0, "b": 3.0},
        {"n": 4, "a": 8.0, "b": 3.0},
    ]
    assert growth.growth(rows) == {"a": 2.0, "b": 0.0}


def test_a_step_trains_and_the_curves_are_drawn(tmp_path: Path) -> None:
    random_state = torch.get_rng_state()
    growth.step_of(ManifoldHyperConnection, dim=64, blocks=1, length=8)()
    torch.set_rng_state(random_state)
    rows = [{"n": 1, "ms": 2.0}, {"n": 2, "ms": 4.0}]
    growth.draw({"one": rows, "another": rows}, tmp_path / "growth.png")
    assert imread(tmp_path / "growth.png").std() > 0
