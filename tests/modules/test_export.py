"""Networks exported or compiled once, for batches and sequences of any size."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from mhc_lightning.modules import (
    Connection,
    HyperConnection,
    ManifoldHyperConnection,
    SinglePassHyperConnection,
    Transformer,
)

SHAPES = ((5, 17), (1, 8), (4, 1))
NETWORKS = [
    (ManifoldHyperConnection, 4, True),
    (SinglePassHyperConnection, 0, False),
    (HyperConnection, 4, False),
]


def exported(module: nn.Module, given: Tensor) -> nn.Module:
    sizes = ({0: Dim("batch"), 1: Dim("length")},)
    return torch.export.export(module, (given,), dynamic_shapes=sizes).module()


@pytest.mark.parametrize(("connection", "num_experts", "training"), NETWORKS)
def test_networks(
    connection: type[Connection],
    num_experts: int,
    training: bool,
    tiny_transformer: Callable[..., Transformer],
) -> None:
    network = tiny_transformer(
        connection=connection, num_experts=num_experts, num_layers=1, num_dense_layers=0
    )
    network.train(training)
    ours = exported(network, torch.randint(0, 40, (2, 9)))
    for shape in SHAPES:
        tokens = torch.randint(0, 40, shape)
        torch.testing.assert_close(ours(tokens), network(tokens), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("connection", [ManifoldHyperConnection, HyperConnection])
def test_one_training_graph_for_all_lengths(
    connection: type[Connection], num_experts: int, tiny_transformer: Callable[..., Transformer]
) -> None:
    network = tiny_transformer(
        connection=connection, num_experts=num_experts, num_layers=1, num_dense_layers=0
    )
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=graphs)
    counts = []
    for shape in ((2, 9), (3, 17), (5, 32)):
        tokens = torch.randint(0, 40, shape)
        torch._dynamo.mark_dynamic(tokens, 0)
        torch._dynamo.mark_dynamic(tokens, 1)
        parameters = list(network.parameters())
        ours, expected = (
            torch.autograd.grad(run(tokens).square().mean(), parameters, allow_unused=True)
            for run in (compiled, network)
        )
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        counts.append(graphs.frame_count)
    assert all(a == b for a, b in pairwise(counts)), counts
