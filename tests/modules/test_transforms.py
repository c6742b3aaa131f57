"""Chains of connections and whole networks under `torch.func`, against ordinary calls."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import CONNECTIONS
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhc_lightning.modules import Transformer
from mhc_lightning.modules.connection import Connection

WIDTH = 6


class Chain(nn.Module):
    """Two sub-layers, each behind its connection."""

    def __init__(self, connection: Callable[..., Connection]) -> None:
        super().__init__()
        self.connections = nn.ModuleList(connection(WIDTH, 4, k) for k in range(2))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, streams: Tensor) -> Tensor:
        flow: Any = streams
        for connection, layer in zip(self.connections, self.layers, strict=True):
            flow = connection.run(flow, lambda u, layer=layer: layer(u).tanh())
        return flow.merge()[0]


def disturbed(module: nn.Module) -> nn.Module:
    """In float64, and away from an initialisation that many gradients vanish at."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def gradients(module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def stacked(trees: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def assert_same(ours: object, expected: object) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


def hold_transforms_against_ordinary_calls(build: Callable[[], nn.Module], given: Tensor) -> None:
    """``given`` [B, …] is a batch of what the module takes."""
    modules = [disturbed(build()) for _ in range(3)]
    module = modules[0]
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    weights = torch.randn_like(module(given))

    def total(parameters: dict[str, Tensor], given: Tensor, weights: Tensor) -> Tensor:
        return (functional_call(module, parameters, (given,)) * weights).sum()

    def weighted(given: Tensor, weights: Tensor) -> Tensor:
        return (module(given) * weights).sum()

    expected = gradients(module, partial(weighted, given, weights))
    assert_same(grad(total)(parameters, given, weights), expected)
    rows = [
        gradients(module, partial(weighted, example, weight))
        for example, weight in zip(given.split(1), weights.split(1), strict=True)
    ]
    each = vmap(grad(total), in_dims=(None, 1, 1))
    assert_same(each(parameters, given[None], weights[None]), stacked(rows))
    state = stack_module_state(modules)
    ensemble = vmap(lambda *state: functional_call(module, state, (given,)), chunk_size=2)
    assert_same(ensemble(*state), torch.stack([member(given) for member in modules]))
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    with sdpa_kernel(SDPBackend.MATH):
        moved = jvp(lambda p: functional_call(module, p, (given,)), (parameters,), (directions,))
    slope = sum((directions[name] * gradient).sum() for name, gradient in expected.items())

    assert_same((weights * moved[1]).sum(), slope)


# All nine, one connection at a time: the composition table (docs/composition.md).
@pytest.mark.parametrize("name", ["hc", "mhc", "mhc_single_pass", "mhc_lite"])
def test_chains_of_connections(name: str) -> None:
    streams = torch.randn(2, 3, 4, WIDTH, dtype=torch.float64)
    hold_transforms_against_ordinary_calls(lambda: Chain(CONNECTIONS[name]), streams)


# On a CPU torch's fused attention has no batching rule, and says that it is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("name", "num_experts", "recompute"),
    [("mhc", 0, 2), ("mhc", 4, "off"), ("hc", 4, 2)],
)
def test_networks(
    name: str,
    num_experts: int,
    recompute: str | int,
    tiny_transformer: Callable[..., Transformer],
) -> None:
    """With recomputation too, of which only an ordinary backward pass makes use."""

    def build() -> Transformer:
        network = tiny_transformer(connection=CONNECTIONS[name], num_experts=num_experts)
        network.set_recompute(recompute)
        return network

    tokens = torch.randint(0, 40, (2, 5))
    hold_transforms_against_ordinary_calls(build, tokens)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_losses(tiny_transformer: Callable[..., Transformer]) -> None:
    network = tiny_transformer(num_experts=0)
    disturbed(network)
    tokens, targets = torch.randint(0, 40, (2, 2, 5))
    targets[0, 2] = -100
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return self.network.loss(tokens, targets)

    def loss(parameters: dict[str, Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
        named = {f"network.{name}": tensor for name, tensor in parameters.items()}
        return functional_call(Loss(), named, (tokens, targets))

    expected = gradients(network, lambda: network.loss(tokens, targets))
    assert_same(grad(loss)(parameters, tokens, targets), expected)
    rows = [
        gradients(network, partial(network.loss, *example))
        for example in zip(tokens.split(1), targets.split(1), strict=True)
    ]
    each = vmap(grad(loss), in_dims=(None, 1, 1))(parameters, tokens[None], targets[None])
    assert_same(each, stacked(rows))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_no_load_is_counted_within_a_transform(
    tiny_transformer: Callable[..., Transformer],
) -> None:
    network = tiny_transformer(num_layers=1, num_dense_layers=0)
    tokens = torch.randint(0, 40, (2, 5))
    parameters: dict[str, Tensor] = dict(network.named_parameters())
    buffers = dict(network.named_buffers())
    (load,) = (t for name, t in buffers.items() if name.endswith("load"))

    def total(parameters: dict[str, Tensor], buffers: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(network, (parameters, buffers), (row[None],)).sum()

    vmap(grad(total), in_dims=(None, None, 0))(parameters, buffers, tokens)
    assert not load.any()
    network(tokens)
    assert load.sum() == tokens.numel() * 2
