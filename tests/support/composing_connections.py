"""Probes of the table: every kind of connection under each feature."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from composing_adapters import LowRankAdapter
from composing_parts import (
    CONNECTIONS,
    DIM,
    STREAMS,
    EveryLayer,
    Layer,
    assert_same,
    layers,
    loss_and_gradients,
    stirred,
)
from composing_processes import in_processes
from composition import probe
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

part = partial(probe, part="connections")


def weighed(streams: Tensor) -> Tensor:
    """A scalar to which every value of the streams [..., n, C] counts differently."""
    return (streams * torch.linspace(-1, 1, streams[0].numel()).view(streams.shape[1:])).sum()


def results(layer: Any, streams: Tensor) -> dict[str, Tensor]:
    return loss_and_gradients(weighed(layer(streams)), layer)


def functional(layer: nn.Module, streams: Tensor):
    """The scalar as a function of the parameters."""
    return lambda parameters: weighed(torch.func.functional_call(layer, parameters, (streams,)))


@part("torch.compile")
def compiled() -> None:
    torch._dynamo.reset()
    every, streams = EveryLayer(), torch.randn(2, 5, STREAMS, DIM)
    expected = results(every, streams)
    found = results(torch.compile(every, fullgraph=True, backend="aot_eager"), streams)
    assert_same({name.removeprefix("_orig_mod."): v for name, v in found.items()}, expected)


@part("torch.export")
def exported() -> None:
    every, streams = EveryLayer(), torch.randn(2, 5, STREAMS, DIM)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.export.export(every, (streams,), dynamic_shapes=({0: batch, 1: length},))
    for shape in ((3, 9), (1, 8), (4, 1)):
        streams = torch.randn(*shape, STREAMS, DIM)
        torch.testing.assert_close(program.module()(streams), every(streams))


@part("func.grad, vjp")
def func_grad() -> None:
    for _, layer, streams in layers():
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        gradients, loss = torch.func.grad_and_value(functional(layer, streams))(parameters)
        assert_same({"loss": loss, **gradients}, results(layer, streams))


@part("func.jacrev")
def func_jacrev() -> None:
    for name, layer, streams in layers():
        streams = streams[:1, :2]
        expected = torch.autograd.functional.jacobian(layer, streams)
        assert_same({name: torch.func.jacrev(layer)(streams)}, {name: expected})


@part("func.vmap")
def func_vmap() -> None:
    for name, build in CONNECTIONS.items():
        models: list[Any] = [
            stirred(Layer(build(dim=DIM, num_streams=STREAMS, layer_index=0)), seed)
            for seed in range(3)
        ]
        parameters, _ = torch.func.stack_module_state(models)
        streams = torch.randn(3, 2, 5, models[0].connection.num_streams, DIM)
        one = partial(torch.func.functional_call, models[0])
        both = torch.vmap(one)(parameters, streams)
        expected = torch.stack([m(x) for m, x in zip(models, streams, strict=True)])
        assert_same({name: both}, {name: expected})
        inputs = torch.vmap(models[0], in_dims=1, out_dims=1)(streams)
        assert_same({name: inputs}, {name: models[0](streams)})


@part("func.jvp, jacfwd")
def func_jvp() -> None:
    for name, layer, streams in layers():
        layer, streams = layer.double(), streams.double()
        tangent = torch.randn_like(streams)
        found = torch.func.jvp(layer, (streams,), (tangent,))[1]
        step = 1e-6 * tangent
        expected = (layer(streams + step) - layer(streams - step)) / 2e-6
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, msg=name)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(streams, tangent)
            again = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
        torch.testing.assert_close(again, found)


@part(
    "double backward",
    raises=(RuntimeError, "no autograd formula was registered"),
    note="`torch.func.hessian` works",
)
def double_backward() -> None:
    def error_of(layer: Layer, streams: Tensor) -> Exception:
        phi_or_bias = next(layer.connection.parameters())
        slope = torch.autograd.grad(weighed(layer(streams)), phi_or_bias, create_graph=True)
        with pytest.raises(RuntimeError) as caught:
            torch.autograd.grad(slope[0].square().sum(), phi_or_bias)
        return caught.value

    # The residual connection has no parameters.
    errors = [error_of(layer, streams) for name, layer, streams in layers() if name != "residual"]
    assert all("no autograd formula was registered" in str(error) for error in errors)
    raise errors[0]


@part("DDP")
def ddp() -> None:
    in_processes("connections", "DDP")


@part("FSDP2")
def fsdp() -> None:
    in_processes("connections", "FSDP2")


@part("adapters", note="around the sub-layer's layers; a connection has none of its own")
def adapters() -> None:
    for _, layer, streams in layers():
        expected = layer(streams)
        linear: Any = layer.body[1]
        layer.body[1] = LowRankAdapter(linear)
        torch.testing.assert_close(layer(streams), expected)  # an adapter begins at zero
        assert all(gradient.isfinite().all() for gradient in results(layer, streams).values())
        stirred(layer.body[1])
        assert not torch.allclose(layer(streams), expected)


@part("dynamic quantisation", note="coefficients stay float32")
def quantised() -> None:
    for _, layer, streams in layers():
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {nn.Linear})
        body = quantised.body
        torch.testing.assert_close(quantised(streams), layer.connection(streams, body))
        torch.testing.assert_close(quantised(streams), layer(streams), rtol=0.1, atol=0.05)


@part("checkpoint wrappers")
def checkpointed() -> None:
    for _, layer, streams in layers():
        streams.requires_grad_()  # the reentrant kind wants it
        expected = results(layer, streams)
        for reentrant in (False, True):
            layer.zero_grad()
            loss = weighed(checkpoint(layer, streams, use_reentrant=reentrant))
            loss.backward()
            gradients = {name: p.grad for name, p in layer.named_parameters()}
            assert_same({"loss": loss, **gradients}, expected)
        wrapped = checkpoint_wrapper(layer)
        found = results(wrapped, streams)
        assert_same(
            {name.removeprefix("_checkpoint_wrapped_module."): v for name, v in found.items()},
            expected,
        )


@part("autocast", note="mappings stay float32")
def autocast() -> None:
    for _, layer, streams in layers():
        expected = layer(streams)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                found = layer(streams.to(dtype))
                mappings = layer.connection.mappings(streams.to(dtype))
            assert found.dtype == dtype
            assert all(mapping.dtype == torch.float32 for mapping in mappings)
            torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@part("meta builds")
def meta() -> None:
    for build in CONNECTIONS.values():
        plain = build(dim=DIM, num_streams=STREAMS, layer_index=0)
        with torch.device("meta"):
            later = build(dim=DIM, num_streams=STREAMS, layer_index=0)
        later.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in later.parameters():
                parameter.fill_(torch.nan)
        later.reset_parameters()
        assert_same(later.state_dict(), plain.state_dict())


@part("EMA, SWA")
def averaged() -> None:
    for _, layer, streams in layers():
        average = torch.optim.swa_utils.AveragedModel(
            layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        average.update_parameters(layer)
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        average.update_parameters(stirred(layer))
        for name, parameter in average.module.named_parameters():
            torch.testing.assert_close(
                parameter, (before[name] + layer.get_parameter(name)) / 2, rtol=1e-6, atol=1e-6
            )
        assert average(streams).isfinite().all()


@part("hooks")
def hooks() -> None:
    for _, layer, streams in layers():
        seen: list[str] = []
        layer.connection.register_forward_pre_hook(partial(note, seen, "before"))
        layer.connection.register_forward_hook(lambda m, args, out: out * 2)
        layer.connection.register_full_backward_hook(partial(note, seen, "gradient"))
        layer.body[1].register_forward_hook(lambda m, args, out: out + 1)
        streams.requires_grad_()
        found = layer(streams)
        plain = copy.deepcopy(layer)
        for hooked in (plain.connection, plain.body[1]):
            hooked._forward_hooks.clear()
        body = nn.Sequential(plain.body, AddOne())
        torch.testing.assert_close(found, 2 * plain.connection(streams, body))
        found.sum().backward()
        assert seen.count("gradient") == 1 and "before" in seen


def note(seen: list[str], what: str, *_: object) -> None:
    seen.append(what)


class AddOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1
