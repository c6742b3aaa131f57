"""A factor on the learning rate of connections."""

from collections.abc import Callable

import pytest
import torch

from mhc_lightning.modules import Connection, HyperConnection, Transformer
from mhc_lightning.optimizers.recipes import AdamWRecipe, MuonRecipe


def connection_parameters(network: torch.nn.Module) -> set[int]:
    connections = [m for m in network.modules() if isinstance(m, Connection)]
    return {id(p) for connection in connections for p in connection.parameters()}


@pytest.mark.parametrize("recipe", [AdamWRecipe, MuonRecipe])
def test_connections_have_groups_of_their_own(
    recipe: type[AdamWRecipe], tiny_transformer: Callable[..., Transformer]
) -> None:
    network = tiny_transformer()
    own = connection_parameters(network)
    plain, _ = recipe(lr=1e-3).build(network, 10)
    scaled, _ = recipe(lr=1e-3, connection_lr_scale=20.0).build(network, 10)
    assert all(group["initial_lr"] == 1e-3 for group in plain.param_groups)

    def settings(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, object]]:
        listed = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        assert len(listed) == len(list(network.parameters())) == len({id(p) for p, _ in listed})
        return {id(p): {k: v for k, v in g.items() if k != "params"} for p, g in listed}

    before, after = settings(plain), settings(scaled)
    for key, found in after.items():
        factor = 20.0 if key in own else 1.0
        assert found.pop("initial_lr") == pytest.approx(factor * 1e-3)
        assert found.pop("lr") == pytest.approx(factor * before[key].pop("lr"))
        before[key].pop("initial_lr")
    assert after == before


def test_both_rates_follow_the_schedule() -> None:
    module = torch.nn.ModuleList([torch.nn.Linear(2, 2), HyperConnection(2, 2, 0)])
    recipe = AdamWRecipe(lr=0.1, warmup_steps=4, schedule="cosine", connection_lr_scale=3.0)
    optimizer, scheduler = recipe.build(module, 10)
    seen = set()
    for _ in range(10):
        optimizer.step()
        scheduler.step()
        weights, _, *connections = (group["lr"] for group in optimizer.param_groups)
        assert connections == pytest.approx([3 * weights] * 2)
        seen.add(weights)
    assert len(seen) > 5


def test_its_state_is_taken_up_again(tiny_transformer: Callable[..., Transformer]) -> None:
    network = tiny_transformer()
    recipe = AdamWRecipe(lr=1e-3, connection_lr_scale=5.0)
    optimizer, _ = recipe.build(network, 10)
    tokens = torch.randint(network.vocab_size, (1, 9))
    network.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    again, _ = recipe.build(network, 10)
    again.load_state_dict(optimizer.state_dict())
    for one, other in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert one["lr"] == other["lr"]
        for p in one["params"]:
            if p in optimizer.state:
                assert torch.equal(optimizer.state[p]["exp_avg"], again.state[p]["exp_avg"])
