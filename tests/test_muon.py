"""Muon: orthogonal updates of the promised size, and AdamW beside it unchanged."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mhc_lightning.modules import Transformer
from mhc_lightning.muon import MuonAdamW, orthogonalise
from mhc_lightning.optimization import AdamW, Muon


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (3, 8, 5)])
def test_orthogonalise_is_close_to_the_polar_factor(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert (orthogonalise(matrices) - u @ v).abs().max() < 0.05
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert (values - 1).abs().max() < 0.1
    assert orthogonalise(torch.zeros(3, 4)).abs().max() == 0


def loss_of(model: Transformer) -> torch.Tensor:
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(3))
    return model.loss(tokens[:, :-1], tokens[:, 1:])


def test_groups_are_the_papers(tiny_transformer: Callable[..., Transformer]) -> None:
    model = tiny_transformer()
    optimizer = Muon(lr=1e-3).build_optimizer(model)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, tables, vectors = [
        {names[id(p)] for p in group["params"]} for group in optimizer.param_groups
    ]
    assert tables == {"embedding.weight", "output.weight"}
    assert {n.rpartition(".")[2] for n in vectors} == {"weight", "alpha", "bias"}
    assert all("norm" in n or "connection" in n for n in vectors)
    assert "blocks.0.attention_connection.phi" in muon
    assert "blocks.1.feed_forward.body.gate_up" in muon
    assert len(muon) + len(tables) + len(vectors) == len(names)


def test_updates_have_the_promised_size_and_adamw_is_torchs(
    tiny_transformer: Callable[..., Transformer],
) -> None:
    model, reference = tiny_transformer(), tiny_transformer()
    recipe = {"lr": 1e-3, "weight_decay": 0.0}
    optimizer = Muon(**recipe).build_optimizer(model)  # type: ignore[arg-type]
    adamw = AdamW(**recipe).build_optimizer(reference)  # type: ignore[arg-type]
    before = copy.deepcopy(dict(model.named_parameters()))
    query = "blocks.0.attention.body.query.weight"
    for network, steps in ((model, optimizer), (reference, adamw)):
        loss_of(network).backward()
        # The real gradient of so small a batch has no full rank.
        network.get_parameter(query).grad.normal_()
        steps.step()
    for name, parameter in model.named_parameters():
        change = (parameter - before[name]).detach()
        if name == query:
            assert change.square().mean().sqrt() == pytest.approx(0.18e-3, rel=0.05)
        if "norm" in name or name in ("embedding.weight", "output.weight"):
            assert torch.equal(parameter, reference.get_parameter(name)), name


def test_decay_shrinks_matrices() -> None:
    layer = nn.Linear(4, 4, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros(4, 4)
    MuonAdamW([{"params": [layer.weight], "weight_decay": 0.5, "muon": True}], lr=0.1).step()
    assert torch.allclose(layer.weight, 0.95 * before)


def test_state_survives_saving_and_schedules_reach_both_parts(
    tiny_transformer: Callable[..., Transformer],
) -> None:
    models = [tiny_transformer(), tiny_transformer()]
    pairs = [Muon(lr=1e-2, warmup_steps=4).build(model, 10) for model in models]
    for step in range(6):
        if step == 3:  # carry on with a fresh optimizer from the first one's state
            models[1].load_state_dict(models[0].state_dict())
            pairs[1][0].load_state_dict(copy.deepcopy(pairs[0][0].state_dict()))
            pairs[1][1].load_state_dict(pairs[0][1].state_dict())
        for model, (optimizer, scheduler) in zip(models, pairs, strict=True):
            if model is models[0] or step >= 3:
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
                scheduler.step()
                assert len({group["lr"] for group in optimizer.param_groups}) == 1
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name)), name


def test_it_learns(tiny_transformer: Callable[..., Transformer]) -> None:
    model = tiny_transformer()
    optimizer = Muon(lr=2e-3).build_optimizer(model)
    first = loss_of(model).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first


def test_state_is_as_large_as_the_recipe_says(tiny_transformer: Callable[..., Transformer]) -> None:
    model, recipe = tiny_transformer(), Muon(lr=1e-3)
    optimizer = recipe.build_optimizer(model)
    loss_of(model).backward()
    optimizer.step()
    for parameter in model.parameters():
        kept = [t for t in optimizer.state[parameter].values() if t.numel() == parameter.numel()]
        # AdamW's step counter has one value, as alpha of one entry would.
        assert len(kept) == recipe.state_per_value(model, parameter)
