"""Probes of the table: `AmaxGain` watching a network under each feature.

What it logs is compared with what it logs without; and once with gains worked out by hand.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from composing_adapters import adapt
from composing_parts import DIM, Watched, cross_entropy, fresh_network, gains_of, network, tokens
from composing_processes import in_processes
from composition import probe
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhc_lightning.callbacks.gains import GAIN_TAGS
from mhc_lightning.modules import HyperConnection, Transformer
from mhc_lightning.modules.block import Block

part = partial(probe, part="callbacks")

NOT_WATCHED = "passes under the transform are not watched, others of the step are"


def watched_network() -> Transformer:
    """Four sub-layers with gains that differ from one."""
    return network(connection=HyperConnection)


def assert_gains(found: dict[str, float], expected: dict[str, float], rel: float = 1e-5) -> None:
    assert max(found[tag] for tag in GAIN_TAGS) > 1.05
    assert found == pytest.approx(expected, rel=rel)


@cache
def plain() -> dict[str, float]:
    """The gains without any feature."""
    return gains_of(Watched(watched_network()))


@part("torch.compile")
def compiled() -> None:
    torch._dynamo.reset()
    net = watched_network()
    for block in net.blocks:
        block.compile(backend="aot_eager")
    assert_gains(gains_of(Watched(net)), plain())


@part("torch.export", note="an exported program has no modules to watch: a warning says so")
def exported() -> None:
    net = torch.export.export(watched_network(), (tokens()[0],)).module()
    with pytest.warns(UserWarning, match="AmaxGain saw no StreamMappings in step 1"):
        assert gains_of(Watched(net)) == {}


def watched_beside(transformed: Callable[[Any], object]) -> None:
    """A step that also transforms the network, before its ordinary pass and behind it."""

    def loss(net: Any) -> Tensor:
        transformed(net)
        ordinary = cross_entropy(net)
        transformed(net)
        return ordinary

    assert_gains(gains_of(Watched(watched_network(), loss)), plain())


@part("func.grad, vjp", note=NOT_WATCHED)
def func_grad() -> None:
    def gradients(net: nn.Module) -> object:
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        return torch.func.grad(
            lambda p: cross_entropy(partial(torch.func.functional_call, net, p))
        )(parameters)

    watched_beside(gradients)


@part("func.jacrev", note=NOT_WATCHED)
def func_jacrev() -> None:
    watched_beside(lambda net: torch.func.jacrev(partial(logits, net))(1.0 * net.norm.weight))


@part("func.vmap", note=NOT_WATCHED)
def func_vmap() -> None:
    watched_beside(
        lambda net: torch.vmap(partial(logits, net), randomness="same")(torch.ones(2, DIM))
    )


@part("func.jvp, jacfwd", note=NOT_WATCHED)
def func_jvp() -> None:
    def derivative(net: Any) -> object:
        weight = net.norm.weight.detach()
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(partial(logits, net), (weight,), (torch.ones_like(weight),))

    watched_beside(derivative)


def logits(net: nn.Module, weight: Tensor) -> Tensor:
    """Two logits of a short sequence, as a function of the last norm's weight."""
    inputs = tokens()[0][:1, :3]
    return torch.func.functional_call(net, {"norm.weight": weight}, (inputs,))[0, 0, :2]


@part("double backward", raises=(RuntimeError, "no autograd formula was registered"))
def double_backward() -> None:
    def penalised(net: Any) -> Tensor:
        loss = cross_entropy(net)
        (slope,) = torch.autograd.grad(loss, net.embedding.weight, create_graph=True)
        return loss + slope.square().sum()

    gains_of(Watched(watched_network(), penalised))


@part("dynamic quantisation", note="torch warns that int8 layers have no gradient")
def quantised() -> None:
    net = torch.ao.quantization.quantize_dynamic(watched_network(), {nn.Linear})
    expected = gains_of(Watched(watched_network()), max_steps=1)
    assert_gains(gains_of(Watched(net), max_steps=1), expected, rel=0.05)


@part("DDP", note="rank zero's samples are logged")
def ddp() -> None:
    in_processes("callbacks", "DDP")


@part("FSDP2", note="rank zero's samples are logged")
def fsdp() -> None:
    in_processes("callbacks", "FSDP2")


@part("adapters")
def adapters() -> None:
    net, same = watched_network(), watched_network()
    adapt(net)
    for name, parameter in same.named_parameters():  # what peft freezes
        parameter.requires_grad_("connection" in name)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("connection" in name)
    assert_gains(gains_of(Watched(net)), gains_of(Watched(same)))


@part("checkpoint wrappers", note="what backward replays is not counted again")
def checkpointed() -> None:
    net = watched_network()
    apply_activation_checkpointing(net, check_fn=lambda m: isinstance(m, Block))
    assert_gains(gains_of(Watched(net)), plain())


@part("autocast")
def autocast() -> None:
    found = gains_of(Watched(watched_network()), precision="bf16-mixed")
    assert_gains(found, plain(), rel=0.02)


@part("meta builds")
def meta() -> None:
    class Late(Watched):
        def configure_model(self) -> None:
            self.net.to_empty(device="cpu")
            net: Any = self.net
            net.reset_parameters()

    with torch.device("meta"):
        net = fresh_network()
    found, expected = gains_of(Late(net)), gains_of(Watched(fresh_network()))
    assert found == pytest.approx(expected)


@part("EMA, SWA", note="the network that is trained is watched, not the average")
def averaged() -> None:
    expected = plain()
    assert_gains(gains_of(Watched(watched_network()), callbacks=[EMAWeightAveraging()]), expected)
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    assert_gains(gains_of(Watched(watched_network()), callbacks=[swa], max_epochs=1), expected)


@part("hooks")
def hooks() -> None:
    net = watched_network()
    seen = []
    for module in net.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    assert_gains(gains_of(Watched(net)), plain())
    assert seen
