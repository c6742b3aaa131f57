"""Probes of the table: a whole network, with mHC and experts, under each feature."""

import copy
from functools import partial
from typing import Any

import torch
from composing_adapters import adapt
from composing_parts import (
    CONNECTIONS,
    VOCABULARY,
    Watched,
    assert_same,
    cross_entropy,
    fit,
    fresh_network,
    loss_and_gradients,
    network,
    stirred,
    tokens,
)
from composing_processes import in_processes
from composition import probe
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint

from mhc_lightning.modules.block import Block

part = partial(probe, part="Transformer")


def results(net: Any) -> dict[str, Tensor]:
    return loss_and_gradients(cross_entropy(net), net)


def networks() -> list[Any]:
    """One without a carry beside its streams, and one with it."""
    return [network(connection=CONNECTIONS[kind]) for kind in ("mhc", "mhc_single_pass")]


@part("torch.compile")
def compiled() -> None:
    torch._dynamo.reset()
    net = network()
    expected = results(net)
    found = results(torch.compile(net, backend="aot_eager"))
    assert_same({name.removeprefix("_orig_mod."): v for name, v in found.items()}, expected)


@part("torch.export")
def exported() -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    other = torch.randint(VOCABULARY, (3, 11))
    for net in networks():
        program = torch.export.export(net, (tokens()[0],), dynamic_shapes=({0: batch, 1: length},))
        torch.testing.assert_close(program.module()(other), net(other))


@part("func.grad, vjp")
def func_grad() -> None:
    for net in networks():
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        gradients, loss = torch.func.grad_and_value(
            lambda p, net=net: cross_entropy(partial(torch.func.functional_call, net, p))
        )(parameters)
        assert_same({"loss": loss, **gradients}, results(net))


@part("func.jacrev")
def func_jacrev() -> None:
    net = network(num_experts=0)
    inputs = tokens()[0][:1, :3]
    name = "blocks.0.attention_connection.bias"
    bias = net.get_parameter(name).detach()

    def logits(value: Tensor) -> Tensor:
        return torch.func.functional_call(net, {name: value}, (inputs,))[0, :, :2]

    found = torch.func.jacrev(logits)(bias)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(logits, bias))


@part("func.vmap")
def func_vmap() -> None:
    nets = [stirred(network(num_experts=0), seed) for seed in range(2)]
    parameters, buffers = torch.func.stack_module_state(nets)
    inputs = tokens()[0]
    run = partial(torch.func.functional_call, nets[0])
    found = torch.vmap(lambda p, b: run((p, b), (inputs,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([net(inputs) for net in nets]))


@part("func.jvp, jacfwd", note="attention by `sdpa_kernel(SDPBackend.MATH)`, as torch asks for")
def func_jvp() -> None:
    net = network().double()
    inputs = tokens()[0]
    name = "blocks.0.attention.body.key_value.weight"
    weight = net.get_parameter(name).detach()
    tangent = torch.randn_like(weight)

    def logits(value: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(net, {name: value}, (inputs,))

    found = torch.func.jvp(logits, (weight,), (tangent,))[1]
    step = 1e-6 * tangent
    expected = (logits(weight + step) - logits(weight - step)) / 2e-6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@part("double backward", raises=(RuntimeError, "no autograd formula was registered"))
def double_backward() -> None:
    net = network()
    weight = net.embedding.weight
    first = torch.autograd.grad(cross_entropy(net), weight, create_graph=True)
    torch.autograd.grad(first[0].square().sum(), weight)


@part("DDP")
def ddp() -> None:
    in_processes("Transformer", "DDP")


@part("FSDP2")
def fsdp() -> None:
    in_processes("Transformer", "FSDP2")


@part("adapters", note="around every `nn.Linear`, the head and the router among them")
def adapters() -> None:
    net = network()
    expected = net(tokens()[0])
    adapted = adapt(net)
    torch.testing.assert_close(net(tokens()[0]), expected)
    for adapter in adapted:
        stirred(adapter.lora_b)
    loss = net.loss(*tokens())
    torch.testing.assert_close(loss, cross_entropy(net))
    loss.backward()
    gradients: list[Any] = [adapter.lora_b.weight.grad for adapter in adapted]
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@part("dynamic quantisation")
def quantised() -> None:
    net = network()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {nn.Linear}).eval()
    inputs, targets = tokens()
    torch.testing.assert_close(quantised.loss(inputs, targets), cross_entropy(quantised))
    torch.testing.assert_close(
        quantised.loss(inputs, targets), net.loss(inputs, targets), rtol=0.05, atol=0
    )
    caches = quantised.new_caches(len(inputs), inputs.shape[1])
    # Every call of a quantised layer chooses the scale of its input anew.
    quantised.forward_cached(inputs[:, :3], caches)
    found, expected = quantised.forward_cached(inputs[:, 3:], caches), quantised(inputs)[:, -1]
    assert (found - expected).norm() < 0.05 * expected.norm()


@part("checkpoint wrappers", note="around any `Block`; `recompute=` costs less")
def checkpointed() -> None:
    expected = results(network())
    wrapped = network()
    apply_activation_checkpointing(wrapped, check_fn=lambda m: isinstance(m, Block))
    found = results(wrapped)
    assert_same(
        {name.replace("_checkpoint_wrapped_module.", ""): v for name, v in found.items()}, expected
    )
    for reentrant in (False, True):
        net = network()
        inputs, targets = tokens()
        flow: Any = (net.embed(inputs), None)
        for block in net.blocks:
            flow = checkpoint(block, *flow, use_reentrant=reentrant)
        streams, carry = flow
        loss = net.head_loss(streams, carry, targets)
        loss.backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        assert_same({"loss": loss.detach(), **gradients}, expected)


@part("autocast", note="streams take its dtype")
def autocast() -> None:
    net = network()
    expected = cross_entropy(net)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert net.embed(tokens()[0]).dtype == dtype
            torch.testing.assert_close(cross_entropy(net).float(), expected, rtol=0.05, atol=0)


@part("meta builds")
def meta() -> None:
    plain = fresh_network()
    with torch.device("meta"):
        later = fresh_network()
    later.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in later.state_dict().values():
            tensor.copy_(torch.full_like(tensor, torch.nan))
    later.reset_parameters()
    assert_same(later.state_dict(), plain.state_dict())


@part("EMA, SWA")
def averaged() -> None:
    module = Watched(network())
    ema = EMAWeightAveraging(decay=0.5)
    fit(module, callbacks=[ema])
    assert all(p.isfinite().all() for p in module.parameters())
    module = Watched(network())
    fit(
        module,
        max_steps=-1,
        max_epochs=3,
        callbacks=[StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
    )
    assert cross_entropy(module.net).isfinite()


@part("hooks", note="on any sub-module, the head and the router among them")
def hooks() -> None:
    net = network()
    before = cross_entropy(net)
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            handle = module.register_forward_hook(lambda m, args, out: out * 1.5)
            changed = cross_entropy(net)
            assert not torch.allclose(changed, before), name
            torch.testing.assert_close(net.loss(*tokens()), changed)
            handle.remove()
    nn.utils.parametrizations.weight_norm(net.output)
    torch.testing.assert_close(net.loss(*tokens()), before)
