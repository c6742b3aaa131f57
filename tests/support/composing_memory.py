"""Probes of the table: a network with Engram in both blocks, and one with Over-Encoding."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from composing_adapters import adapt
from composing_parts import (
    VOCABULARY,
    Watched,
    assert_same,
    cross_entropy,
    fit,
    fresh_network,
    loss_and_gradients,
    stirred,
    tokens,
)
from composing_processes import in_processes
from composition import probe
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from networks import MEMORIES
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from mhc_lightning.modules.block import Block
from mhc_lightning.modules.memory.engram import EngramGate

part = partial(probe, part="memory")


def bound(net: Any) -> Any:
    """The network with a tokenizer that ends documents and merges tokens."""
    net.memory.bind(np.arange(VOCABULARY) // 2, 3)
    return net


def network(kind: str, **changes: Any) -> Any:
    """A network in whose memory every part acts; always the same."""
    return bound(stirred(fresh_network(memory=MEMORIES[kind], **changes)))


def networks(**changes: Any) -> Iterator[Any]:
    """One with each memory."""
    for kind in ("engram", "over_encoding"):
        yield network(kind, **changes)


def results(net: Any) -> dict[str, Tensor]:
    return loss_and_gradients(cross_entropy(net), net)


def a_weight(net: Any) -> str:
    """The name of a weight of the memory."""
    return next(
        name
        for name, _ in net.named_parameters()
        if name.endswith(("memory.gate.key_norm", "memory.projection.weight"))
    )


@part("torch.compile")
def compiled() -> None:
    for net in networks():
        torch._dynamo.reset()
        expected = results(net)
        found = results(torch.compile(net, backend="aot_eager"))
        assert_same({name.removeprefix("_orig_mod."): v for name, v in found.items()}, expected)


@part("torch.export", note="the constants of the hash are in the program")
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
    inputs = tokens()[0][:1, :3]
    for net in networks(num_experts=0):
        name = a_weight(net)

        def logits(value: Tensor, net: Any = net, name: str = name) -> Tensor:
            return torch.func.functional_call(net, {name: value}, (inputs,))[0, :, :2]

        weight = net.get_parameter(name).detach()
        found = torch.func.jacrev(logits)(weight)
        torch.testing.assert_close(found, torch.autograd.functional.jacobian(logits, weight))


@part("func.vmap", note="the networks may hash with other seeds")
def func_vmap() -> None:
    inputs = tokens()[0]
    for kind in ("engram", "over_encoding"):
        more: list[dict[str, Any]] = [{}, {"seed": 1} if kind == "engram" else {}]
        nets = [
            bound(stirred(fresh_network(memory=partial(MEMORIES[kind], **each), num_experts=0), k))
            for k, each in enumerate(more)
        ]
        parameters, buffers = torch.func.stack_module_state(nets)
        run = partial(torch.func.functional_call, nets[0])
        found = torch.vmap(lambda p, b, run=run: run((p, b), (inputs,)))(parameters, buffers)
        torch.testing.assert_close(found, torch.stack([net(inputs) for net in nets]))


@part("func.jvp, jacfwd", note="attention by `sdpa_kernel(SDPBackend.MATH)`, as torch asks for")
def func_jvp() -> None:
    inputs = tokens()[0]
    for net in networks():
        net.double()
        name = a_weight(net)
        weight = net.get_parameter(name).detach()
        tangent = torch.randn_like(weight)

        def logits(value: Tensor, net: Any = net, name: str = name) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return torch.func.functional_call(net, {name: value}, (inputs,))

        found = torch.func.jvp(logits, (weight,), (tangent,))[1]
        step = 1e-6 * tangent
        expected = (logits(weight + step) - logits(weight - step)) / 2e-6
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@part("double backward", raises=(RuntimeError, "no autograd formula was registered"))
def double_backward() -> None:
    for net in networks():
        weight = net.get_parameter(a_weight(net))
        first = torch.autograd.grad(cross_entropy(net), weight, create_graph=True)
        torch.autograd.grad(first[0].square().sum(), weight)


@part("DDP")
def ddp() -> None:
    in_processes("memory", "DDP")


@part("FSDP2")
def fsdp() -> None:
    in_processes("memory", "FSDP2")


@part("adapters", note="around the projections; tables have none")
def adapters() -> None:
    for net in networks():
        expected = net(tokens()[0])
        linear = [m for name, m in net.named_modules() if "memory" in name]
        count = sum(isinstance(module, nn.Linear) for module in linear)
        adapted = adapt(net)
        assert count and len(adapted) > count
        torch.testing.assert_close(net(tokens()[0]), expected)
        for adapter in adapted:
            stirred(adapter.lora_b)
        cross_entropy(net).backward()
        gradients: list[Any] = [adapter.lora_b.weight.grad for adapter in adapted]
        assert all(gradient.abs().max() > 0 for gradient in gradients)


@part("dynamic quantisation", note="of the projections; rows stay float32")
def quantised() -> None:
    inputs, targets = tokens()
    for net in networks():
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {nn.Linear}).eval()
        torch.testing.assert_close(
            quantised.loss(inputs, targets), net.loss(inputs, targets), rtol=0.05, atol=0
        )
        caches = quantised.new_caches(len(inputs), inputs.shape[1] + 1)
        # At once: every call of a quantised layer chooses the scale of its input anew.
        found, expected = quantised.forward_cached(inputs, caches), quantised(inputs)[:, -1]
        assert (found - expected).norm() < 0.05 * expected.norm()
        assert quantised.forward_cached(inputs[:, :1], caches).isfinite().all()


@part("checkpoint wrappers", note="`recalled` goes along; the gates are computed again")
def checkpointed() -> None:
    inputs, targets = tokens()
    for kind in ("engram", "over_encoding"):
        expected = results(network(kind))
        wrapped = network(kind)
        apply_activation_checkpointing(wrapped, check_fn=lambda m: isinstance(m, Block))
        found = results(wrapped)
        assert_same(
            {name.replace("_checkpoint_wrapped_module.", ""): v for name, v in found.items()},
            expected,
        )
        for reentrant in (False, True):
            net = network(kind)
            recalled = net.recall(inputs)
            flow: Any = (net.embed(inputs, recalled), None)
            for block in net.blocks:
                flow = checkpoint(block, *flow, None, True, recalled, use_reentrant=reentrant)
            streams, carry = flow
            loss = net.head_loss(streams, carry, targets)
            loss.backward()
            gradients = {name: p.grad for name, p in net.named_parameters()}
            assert_same({"loss": loss.detach(), **gradients}, expected)


@part("autocast", note="rows and gates stay float32; `.double()` and `.bfloat16()` work, too")
def autocast() -> None:
    inputs, targets = tokens()
    for net in networks():
        expected = cross_entropy(net)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert net.embed(inputs).dtype == dtype
                torch.testing.assert_close(cross_entropy(net).float(), expected, rtol=0.05, atol=0)
        wide, narrow = copy.deepcopy(net).double(), copy.deepcopy(net).bfloat16()
        torch.testing.assert_close(wide.loss(inputs, targets).float(), expected)
        torch.testing.assert_close(
            narrow.loss(inputs, targets).float(), expected, rtol=0.05, atol=0
        )
        assert all(b.dtype == torch.int64 for b in narrow.memory.buffers())
        tables = [p for name, p in narrow.named_parameters() if name.endswith("table.weight")]
        assert tables and all(table.dtype == torch.float32 for table in tables)


@part("meta builds")
def meta() -> None:
    for kind in ("engram", "over_encoding"):
        plain = bound(fresh_network(memory=MEMORIES[kind]))
        with torch.device("meta"):
            later = bound(fresh_network(memory=MEMORIES[kind]))
        later.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in later.state_dict().values():
                tensor.fill_(torch.nan if tensor.is_floating_point() else -9)
        later.reset_parameters()
        assert_same(later.state_dict(), plain.state_dict())


AVERAGES = "averages of buffers would destroy the hash's constants, and `LanguageModel` refuses"


@part("EMA, SWA", note=f"with `EMAWeightAveraging(use_buffers=False)`: {AVERAGES}")
def averaged() -> None:
    for kind in ("engram", "over_encoding"):
        module = Watched(network(kind))
        constants = {
            name: b.clone() for name, b in module.net.get_submodule("memory").named_buffers()
        }
        fit(module, callbacks=[EMAWeightAveraging(use_buffers=False, decay=0.5)])
        swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
        fit(module, max_steps=-1, max_epochs=3, callbacks=[swa])
        assert cross_entropy(module.net).isfinite()
        for name, buffer in module.net.get_submodule("memory").named_buffers():
            assert torch.equal(buffer, constants[name])


@part("hooks", note="on any sub-module; the gates of Engram pass `gate.window`")
def hooks() -> None:
    seen: list[Tensor] = []
    for net in networks():
        before = cross_entropy(net)
        for name, module in net.named_modules():
            if "memory" in name and isinstance(module, nn.Linear):
                handle = module.register_forward_hook(lambda m, args, out: out + 0.3 * out.flip(-1))
                changed = cross_entropy(net)
                assert not torch.allclose(changed, before), name
                torch.testing.assert_close(net.loss(*tokens()), changed)
                handle.remove()
            if isinstance(module, EngramGate):
                module.window.register_forward_hook(lambda m, args, out: seen.append(out))
        torch.testing.assert_close(net.loss(*tokens()), before)
        assert seen and all(gates.shape == (4, 7, net.num_streams) for gates in seen)
        weight_of = net.get_parameter(a_weight(net))
        owner = net.get_submodule(a_weight(net).rpartition(".")[0])
        if isinstance(owner, nn.Linear):
            nn.utils.parametrizations.weight_norm(owner)
            torch.testing.assert_close(net.loss(*tokens()), before)
        assert weight_of.requires_grad
