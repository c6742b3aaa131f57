"""What `upcycle` refuses: in one line that says how to mend it, with the model unchanged."""

import re
from typing import Any

import pytest
import torch
from networks import CONNECTIONS, MEMORIES, tiny_transformer
from pretrained import some_tokens, tiny_pretrained
from torch import nn

from mhc_lightning.errors import UserError
from mhc_lightning.modules import Connection, HyperConnection, ManifoldHyperConnection
from mhc_lightning.upcycling import upcycle, wide_block


class LlamaBlock(nn.Module):
    """A class of blocks that nobody has registered."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return x + self.linear(x)


class Without(Connection):
    """A connection without start_as_residual()."""


class Doubling(HyperConnection):
    """A connection whose start is none."""

    def start_as_residual(self) -> None:
        super().start_as_residual()
        with torch.no_grad():
            self.bias[: self.num_streams] *= 2


class Stack(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaBlock() for _ in range(depth))

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def one_linear(block: Any, x: Any, connect: Any) -> Any:
    return connect(0, x, block.linear)


def refused(message: str, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        upcycle(model, *args, **kwargs)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == classes
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_family_without_an_adapter_is_named_beside_the_nearest() -> None:
    refused(
        "no adapter for Stack with its blocks LlamaBlock (the nearest that there is: Lla", Stack()
    )
    refused("docs/your_project/upcycling_families.md", Stack())


def test_a_model_that_is_upcycled() -> None:
    model = upcycle(tiny_pretrained())
    refused("is upcycled already", model)
    refused("is upcycled already", nn.ModuleDict({"inside": model}))


@pytest.mark.parametrize("n", [0, -1])
def test_numbers_of_streams_out_of_range(n: int) -> None:
    refused(f"num_streams must be at least 1, not {n}", tiny_pretrained(), num_streams=n)


def test_a_number_of_streams_that_the_connection_does_not_take() -> None:
    refused("at least 2 streams", tiny_pretrained(), num_streams=1)
    refused("at most 4", tiny_pretrained(), CONNECTIONS["mhc_lite"], 5)


def test_connections_that_cannot_start() -> None:
    refused("Without does not implement start_as_residual()", tiny_pretrained(), Without)
    refused("read weights sum to [2.0], not 1", tiny_pretrained(), Doubling)
    refused("gives a Linear", tiny_pretrained(), lambda **_: nn.Linear(1, 1))


def test_blocks_that_are_not_there() -> None:
    refused("no blocks='blocks'; lists of modules in it: 'layers'", Stack(), blocks="blocks")
    refused("there is no block in 'layers'", Stack(0), blocks="layers", forward=one_linear)
    refused("layers.0 is a LlamaBlock", Stack(), blocks="layers")
    refused("not where the blocks are", Stack(), forward=one_linear)


def test_a_width_that_is_not_known_or_does_not_fit() -> None:
    refused("as dim=", Stack(), blocks="layers", forward=one_linear, sublayers=1)
    model = upcycle(Stack(), blocks="layers", forward=one_linear, sublayers=1, dim=8)
    with pytest.raises(UserError, match="built for a width of 8"):
        model(torch.randn(2, 4))


def test_several_networks_in_one_model() -> None:
    model: Any = nn.ModuleDict({"a": tiny_pretrained(), "b": tiny_pretrained()})
    refused("several networks of blocks ('a.model.layers', 'b.model.layers')", model)
    upcycle(model, blocks="a.model.layers", dim=32)
    assert hasattr(model["a"].model.layers[0], "connections")
    assert not hasattr(model["b"].model.layers[0], "connections")


def test_a_block_whose_forward_was_replaced() -> None:
    model = tiny_pretrained()
    model.model.layers[1].forward = model.model.layers[1].forward
    refused("forward of model.layers.1 (LlamaDecoderLayer) has been replaced", model)


def test_a_block_with_connections_of_its_own() -> None:
    model = Stack()
    model.layers[0].connections = nn.Linear(1, 1)
    refused("an attribute `connections`", model, blocks="layers", forward=one_linear, dim=4)


def test_transformers_of_this_package() -> None:
    refused("has ManifoldHyperConnections already", tiny_transformer("mhc"))
    refused("has a memory", tiny_transformer("residual", memory=MEMORIES["engram"]))
    refused(
        "upcycle them one by one",
        nn.ModuleList([tiny_transformer("residual")] * 1 + [tiny_transformer("residual")]),
    )


def twice(block: Any, x: Any, connect: Any) -> Any:
    return connect(0, connect(0, x, block.linear), block.linear)


def unconnected(block: Any, x: Any, connect: Any) -> Any:
    return x


def a_tensor(block: Any, x: Any, connect: Any) -> Any:
    return connect(0, torch.ones(1), block.linear)


def a_tuple(block: Any, x: Any, connect: Any) -> Any:
    return connect(0, x, lambda u: (u, None))


def narrower(block: Any, x: Any, connect: Any) -> Any:
    return connect(0, x, lambda u: u[..., :2])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (twice, "calls connection 0 where 1 of 1 is due"),
        (unconnected, "calls 0 of 1 connections and returns a _Entry"),
        (a_tensor, "gives connection 0 a Tensor"),
        (a_tuple, "sub-layer 0 of LlamaBlock returns tuple for an input of shape [2, 4]"),
        (narrower, "returns [2, 2] for an input of shape [2, 4]"),
    ],
)
def test_adapters_that_are_wrong(function: Any, message: str) -> None:
    model = upcycle(Stack(), blocks="layers", forward=function, sublayers=1, dim=4)
    with pytest.raises(UserError, match=re.escape(message)):
        model(torch.randn(2, 4))


def test_a_registration_of_nothing() -> None:
    with pytest.raises(UserError, match="registers nothing"):
        wide_block(sublayers=2)
    with pytest.raises(UserError, match="sublayers=0 registers nothing"):
        wide_block("SomeBlock", sublayers=0)


def test_a_failure_in_a_late_block_leaves_the_first_ones_alone() -> None:
    def late(dim: int, num_streams: int, layer_index: int) -> Connection:
        if layer_index > 3:
            raise UserError("late")
        return ManifoldHyperConnection(dim, num_streams, layer_index)

    model = tiny_pretrained()
    refused("late", model, late)
    assert model(some_tokens()).logits.isfinite().all()
