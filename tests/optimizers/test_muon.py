"""Muon: orthogonal updates of the promised size, and AdamW beside it unchanged."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mhc_lightning.modules import Transformer
from mhc_lightning.optimizers.muon import MuonAdamW, orthogonalise
from mhc_lightning.optimizers.recipes import AdamWRecipe, MuonRecipe


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (3, 8, 5)])
def test_orthogonalise_is_close_to_the_polar_factor(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert (orthogonalise(matrices) - u @ v).abs().max() < 0.05
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert (values - 1).abs().max() < 0.1
    assert orthogonalise(torch.zeros(3, 4)).abs().max() == 0


def exact_factor(matrix: Tensor) -> Tensor:
    """What ten steps make of a matrix, by its singular values, times norm / (norm + 1e-7)."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    norm = values.max() * (values / values.max()).square().sum().sqrt()
    if values.max() == 0:
        return torch.zeros_like(matrix, dtype=torch.float64)
    s = values / norm
    for step in range(10):
        a, b, c = (3.4445, -4.7750, 2.0315) if step < 8 else (2.0, -1.5, 0.5)
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v * (norm / (norm + 1e-7))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 7), (1, 1)])
@pytest.mark.parametrize(
    ("dtype", "sizes", "error"),
    [
        (torch.float64, (1e-200, 1e-30, 1e-9, 1e-7, 1.0, 1e30, 1e200), 1e-9),
        (torch.float32, (1e-44, 1e-30, 1e-9, 1e-7, 1.0, 1e19, 1e30, 3e38), 1e-3),
        (torch.bfloat16, (1e-30, 1e-9, 1e-7, 1.0, 1e30), 5e-3),
        (torch.float16, (1e-7, 1e-3, 1.0, 6e4), 2e-3),
    ],
)
def test_a_matrix_of_any_size_has_its_factor(
    shape: tuple[int, int], dtype: torch.dtype, sizes: tuple[float, ...], error: float
) -> None:
    """Alone, and in a stack of matrices of all sizes, zero among them."""
    direction = torch.randn(*shape, dtype=torch.float64)
    direction /= direction.abs().max()
    stack = torch.stack([size * direction for size in (0.0, *sizes)]).to(dtype)
    found = orthogonalise(stack)
    assert found.dtype == dtype and found[0].count_nonzero() == 0
    for matrix, factor in zip(stack, found, strict=True):
        expected = exact_factor(matrix)
        for ours in (factor, orthogonalise(matrix)):
            assert (ours.double() - expected).abs().max() < error


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (0, 0)])
def test_nothing_has_nothing(shape: tuple[int, ...]) -> None:
    assert orthogonalise(torch.zeros(shape)).shape == shape


def test_an_expert_without_tokens_goes_on_by_its_momentum_until_that_has_died_away() -> None:
    """Its momentum is that of torch's Muon; later gradients find it in order."""
    begin, grads = 0.02 * torch.randn(3, 8, 4), 1e-3 * torch.randn(3, 8, 4)
    experts = nn.Parameter(begin.clone())
    alone = [nn.Parameter(matrix.clone()) for matrix in begin]
    ours = MuonAdamW(
        [{"params": [experts], "weight_decay": 0.0, "muon": True}], lr=1e-3, momentum=0.5
    )
    theirs = torch.optim.Muon(alone, lr=1e-3, momentum=0.5, weight_decay=0.0)
    resting = None
    for step in range(200):  # squares of what is left are gone by the 60th, the rest by the 150th
        if step == 1:
            grads = grads * torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1)
        if step == 40:
            resting = experts[0].detach().clone()
        experts.grad = grads.clone()
        for parameter, grad in zip(alone, grads, strict=True):
            parameter.grad = grad.clone()
        ours.step()
        theirs.step()
        for parameter, momentum in zip(alone, ours.state[experts]["momentum"], strict=True):
            assert torch.equal(theirs.state[parameter]["momentum_buffer"], momentum)
    assert resting is not None and experts.isfinite().all()
    assert (experts[0] - resting).abs().max() < 1e-6
    assert (experts[0] - begin[0]).square().mean().sqrt() > 1e-3, "it did go on"
    before = experts[0].detach().clone()
    experts.grad = 1e-3 * torch.randn(3, 8, 4)
    ours.step()
    change = (experts[0].detach() - before).square().mean().sqrt()
    assert change == pytest.approx(0.18e-3, rel=0.1)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_parameters_are_updated_as_whole_ones(mesh: DeviceMesh) -> None:
    shapes, grads = [(3, 6, 4), (5, 4), (7,)], []
    whole = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    parts = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
    optimizers = [
        MuonAdamW([{"params": ps[:2], "muon": True}, {"params": ps[2:], "muon": False}], lr=0.1)
        for ps in (whole, parts)
    ]
    for size in (1.0, 1e-30, 1e30, 0.0):
        grads = [size * torch.randn(shape) for shape in shapes]
        grads[0][0] = 0
        for parameter, part, grad in zip(whole, parts, grads, strict=True):
            parameter.grad = grad.clone()
            part.grad = distribute_tensor(grad.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    for parameter, part in zip(whole, parts, strict=True):
        assert isinstance(part.data, DTensor) and parameter.isfinite().all()
        assert torch.equal(part.data.full_tensor(), parameter)


def loss_of(model: Transformer) -> torch.Tensor:
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(3))
    return model.loss(tokens[:, :-1], tokens[:, 1:])


def test_groups_are_the_papers(tiny_transformer: Callable[..., Transformer]) -> None:
    model = tiny_transformer()
    optimizer = MuonRecipe(lr=1e-3).build_optimizer(model)
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
    optimizer = MuonRecipe(**recipe).build_optimizer(model)  # type: ignore[arg-type]
    adamw = AdamWRecipe(**recipe).build_optimizer(reference)  # type: ignore[arg-type]
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
    pairs = [MuonRecipe(lr=1e-2, warmup_steps=4).build(model, 10) for model in models]
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
    optimizer = MuonRecipe(lr=2e-3).build_optimizer(model)
    first = loss_of(model).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first


def test_state_is_as_large_as_the_recipe_says(tiny_transformer: Callable[..., Transformer]) -> None:
    model, recipe = tiny_transformer(), MuonRecipe(lr=1e-3)
    optimizer = recipe.build_optimizer(model)
    loss_of(model).backward()
    optimizer.step()
    for parameter in model.parameters():
        kept = [t for t in optimizer.state[parameter].values() if t.numel() == parameter.numel()]
        # AdamW's step counter has one value, as alpha of one entry would.
        assert len(kept) == recipe.state_per_value(model, parameter)
