"""A network built on meta gets the values of one built with memory, however it is materialised."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.init import (
    _materialize_distributed_module,
    _materialize_meta_tensors,
)
from networks import CONNECTIONS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations
from torch.testing._internal.distributed.fake_pg import FakeStore

from mhc_lightning.errors import UserError
from mhc_lightning.modules import (
    Connection,
    ManifoldHyperConnection,
    MixtureOfExperts,
    Transformer,
)
from mhc_lightning.modules.initialisation import held_rows
from mhc_lightning.modules.mixture_of_experts import LoadBalance

CPU = torch.device("cpu")
Build = Callable[..., Transformer]


@pytest.fixture(autouse=True)
def _new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def build(tiny_transformer: Build) -> Build:
    """The tiny network, with a bias and a padding token that are not its own idea."""

    def build(**changes: Any) -> Transformer:
        model = tiny_transformer(**changes)
        model.output = nn.Linear(16, 40)
        model.embedding = nn.Embedding(40, 16, padding_idx=3)
        if not model.output.weight.is_meta:
            model.reset_parameters()
        return model

    return build


def to_empty(model: Transformer) -> None:
    model.to_empty(device=CPU)
    model.reset_parameters()


def init_weights(model: Transformer) -> None:
    """As torchtitan: memory for all, then a method of the wrapper's."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.reset_parameters()


def lightning(model: Transformer) -> None:
    model.reset_parameters()  # on meta: only says how to draw
    _materialize_meta_tensors(model, CPU)


def lightning_sharded(model: Transformer) -> None:
    model.reset_parameters()
    _materialize_distributed_module(model, CPU)


def apply(model: Transformer) -> None:
    model.reset_parameters()
    model.to_empty(device=CPU)

    def draw(module: nn.Module) -> None:
        if module is not model and hasattr(module, "reset_parameters"):
            module.reset_parameters()

    model.apply(draw)


def assign(model: Transformer) -> None:
    other = copy.deepcopy(model)
    to_empty(other)
    model.load_state_dict(other.state_dict(), assign=True)


RECIPES = [to_empty, init_weights, lightning, lightning_sharded, apply, assign]


def same(model: Transformer, expected: Transformer) -> None:
    """Parameters, buffers that no checkpoint has, and losses."""
    ours = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in [*expected.named_parameters(), *expected.named_buffers()]:
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("recipe", "connection"),
    [
        *((recipe, "mhc") for recipe in RECIPES),
        *((to_empty, connection) for connection in CONNECTIONS if connection != "mhc"),
        (lightning_sharded, "hc"),
        (apply, "krom"),
    ],
)
def test_every_recipe_gives_the_same_network(
    recipe: Callable[[Transformer], None], connection: str, build: Build
) -> None:
    expected = build(connection=CONNECTIONS[connection])
    assert (expected.output.bias == 0).all() and (expected.embedding.weight[3] == 0).all()
    with torch.device("meta"):
        model = build(connection=CONNECTIONS[connection])
    recipe(model)
    same(model, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_balancing_goes_on(recipe: Callable[[Transformer], None], build: Build) -> None:
    with torch.device("meta"):
        model = build()
    recipe(model)
    tokens = torch.randint(0, 40, (2, 9))
    model.loss(tokens, tokens).backward()
    (balance,) = (m for m in model.modules() if isinstance(m, LoadBalance))
    assert balance.load.sum() == 2 * tokens.numel()
    balance.update()
    assert balance.bias.abs().max() == pytest.approx(0.001)


def test_tensors_set_one_by_one(build: Build) -> None:
    """As loaders do that know parameters and persistent buffers alone."""
    expected = build()
    with torch.device("meta"):
        model = build()
    for name, tensor in expected.state_dict().items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        kept = module._parameters if last in module._parameters else module._buffers
        kept[last] = nn.Parameter(tensor) if last in module._parameters else tensor
    tokens = torch.randint(0, 40, (2, 9))
    model(tokens)
    assert model.blocks[1].feed_forward.body.balance.load.sum() == 2 * tokens.numel()


def test_lightning_makes_modules_empty(tiny_transformer: Build) -> None:
    """``empty_init`` turns ``torch.nn.init`` off; the network does not need it."""
    expected = tiny_transformer()
    with pl.Trainer(accelerator="cpu", logger=False).init_module(empty_init=True):
        model = tiny_transformer()
    same(model, expected)


def test_assigned_coefficients_are_float32(tiny_transformer: Build) -> None:
    model = tiny_transformer()
    low = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.load_state_dict(low, assign=True)
    assert all(t.dtype == torch.bfloat16 for t in low.values())
    assert model.blocks[0].attention_connection.phi.dtype == torch.float32
    assert model.blocks[1].feed_forward.body.balance.bias.dtype == torch.float32
    assert model.output.weight.dtype == torch.bfloat16


@contextmanager
def process(rank: int, count: int) -> Iterator[None]:
    """This process, as if it were one of several; none of the others is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("recipe", "rank", "shape", "connection"),
    [
        (to_empty, 0, (4,), "mhc"),
        (to_empty, 2, (4,), "hc"),
        (to_empty, 3, (4,), "mhc_single_pass"),
        (to_empty, 4, (2, 3), "mhc"),
        (lightning_sharded, 3, (4,), "mhc"),
        (lightning_sharded, 4, (2, 3), "hc"),
    ],
)
def test_a_process_draws_its_own_rows(
    recipe: Callable[[Transformer], None],
    rank: int,
    shape: tuple[int, ...],
    connection: str,
    build: Build,
) -> None:
    """FSDP2 over all processes, and over three of them within two replicas."""
    expected = build(connection=CONNECTIONS[connection])
    with torch.device("meta"):
        model = build(connection=CONNECTIONS[connection])
    count = shape[0] if len(shape) == 1 else shape[0] * shape[1]
    with process(rank, count):
        names = ("shards",) if len(shape) == 1 else ("replicas", "shards")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        recipe(model)
        ours = dict(model.named_parameters())
        for name, parameter in expected.named_parameters():
            shard: Tensor = ours[name]
            assert isinstance(shard, DTensor)
            parts = list(parameter.chunk(shape[-1])) + [parameter[:0]] * shape[-1]
            assert torch.equal(shard.to_local(), parts[rank % shape[-1]]), name
            held, first = held_rows(shard)
            assert torch.equal(held, parameter[first : first + len(held)])


def test_experts_alone_are_drawn() -> None:
    with torch.device("meta"):
        experts = MixtureOfExperts(16, 8, 4, 2, 1)
    experts.to_empty(device=CPU)
    for module in experts.modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
    for matrix in (experts.gate_up, experts.down):
        assert 0 < matrix.abs().max() <= matrix.shape[1] ** -0.5
    assert experts(torch.randn(5, 16)).isfinite().all()


def test_what_cannot_be_drawn_is_named(build: Build) -> None:
    class Scale(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.scale = base, nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * self.scale

    class Own(ManifoldHyperConnection):
        reset_parameters = Connection.reset_parameters

    model = build()
    attention = model.blocks[0].get_submodule("attention")
    attention.norm = Scale(attention.get_submodule("norm"))
    with pytest.raises(UserError, match=r"blocks.0.attention.norm \(Scale\) has parameters"):
        model.reset_parameters()
    model = build()
    parametrizations.weight_norm(model.output)
    with pytest.raises(UserError, match="weights of ParametrizedLinear are parametrized"):
        model.reset_parameters()
    with pytest.raises(TypeError, match=r"Own does not implement reset_parameters\(\)"):
        Own(dim=4)


def test_copies_draw_for_themselves(tiny_transformer: Build) -> None:
    model = tiny_transformer()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in [*model.parameters(), *other.parameters()]:
            parameter.fill_(7)
    other.output.reset_parameters()
    assert (model.output.weight == 7).all() and (other.output.weight != 7).all()


def test_fake_tensors_build_and_run(tiny_transformer: Build) -> None:
    """What planners count memory with; networks that are built afterwards notice nothing."""
    expected = tiny_transformer()
    with FakeTensorMode():
        model = tiny_transformer()
        tokens = torch.zeros(2, 5, dtype=torch.int64)
        model.loss(tokens, tokens).backward()
    assert model.init_seed == expected.init_seed
    assert all(isinstance(p, FakeTensor) and p.grad is not None for p in model.parameters())
    ours = tiny_transformer().state_dict()
    assert all(torch.equal(ours[name], right) for name, right in expected.state_dict().items())
