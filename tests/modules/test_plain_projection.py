"""A module in the place of a projection is called: its weight is not read past it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from mhc_lightning.modules import MixtureOfExperts, Transformer
from mhc_lightning.modules.plain_projection import plain_weight

TOKENS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))
TARGETS = TOKENS.flip(1)


class LoRA(nn.Module):
    """As peft's layers: the projection, an adapter, and the projection's own weight as theirs."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_a = nn.Parameter(0.3 * torch.randn(2, base.in_features))
        self.lora_b = nn.Parameter(0.3 * torch.randn(base.out_features, 2))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.lora_a.T @ self.lora_b.T


class DoRA(LoRA):
    """A magnitude for each output, and a direction (arXiv 2402.09353)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.magnitude = nn.Parameter(2 * base.weight.detach().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base_layer.weight + self.lora_b @ self.lora_a
        return F.linear(x, F.normalize(weight, dim=1) * self.magnitude[:, None])


def with_bias(base: nn.Linear) -> nn.Module:
    other = nn.Linear(base.in_features, base.out_features)
    nn.init.normal_(other.bias)
    return other


def with_forward_hook(base: nn.Linear) -> nn.Module:
    base.register_forward_hook(lambda _module, _args, output: 3 * output)
    return base


def with_pre_hook(base: nn.Linear) -> nn.Module:
    base.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))
    return base


def with_backward_hook(base: nn.Linear) -> nn.Module:
    def scaled(_module: nn.Module, grads: Any, _out: Any) -> tuple[Tensor]:
        return (5 * grads[0],)

    base.register_full_backward_hook(scaled)
    return base


def with_its_own_forward(base: nn.Linear) -> nn.Module:
    plain = base.forward
    base.forward = lambda input: 2 * plain(input)  # type: ignore[method-assign]
    return base


def parametrized(base: nn.Linear) -> nn.Module:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(base, "weight", Doubled())
    return base


class Noisy(nn.Linear):
    """A class of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


def subclassed(base: nn.Linear) -> nn.Module:
    return Noisy(base.in_features, base.out_features, bias=False)


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "lora": LoRA,
    "dora": DoRA,
    "bias": with_bias,
    "forward_hook": with_forward_hook,
    "pre_hook": with_pre_hook,
    "backward_hook": with_backward_hook,
    "own_forward": with_its_own_forward,
    "parametrized": parametrized,
    "weight_norm": parametrizations.weight_norm,
    "subclass": subclassed,
}


def quantised(base: nn.Linear) -> nn.Module:
    """Dynamic int8, whose weight is a method."""
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(base), {nn.Linear})[0]


@pytest.fixture
def model(tiny_transformer: Callable[..., Transformer]) -> Transformer:
    """With weights large enough for an adapter to be seen."""
    return tiny_transformer(init_std=0.3)


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros(()) if grad is None else grad for grad in found]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_logits(kind: str, model: Transformer) -> None:
    plain = model.loss(TOKENS, TARGETS)
    model.output = KINDS[kind](model.output)  # type: ignore[assignment]
    expected = F.cross_entropy(model(TOKENS).flatten(0, 1), TARGETS.flatten())
    loss = model.loss(TOKENS, TARGETS)
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert kind in ("backward_hook", "weight_norm") or abs(loss - plain) > 1e-3
    of_head = {id(parameter) for parameter in model.output.parameters()}
    ours, theirs = gradients(loss, model), gradients(expected, model)
    for parameter, grad, wanted in zip(model.parameters(), ours, theirs, strict=True):
        assert (grad - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert id(parameter) not in of_head or grad.abs().max() > 0
    losses = model.token_losses(TOKENS, TARGETS)
    assert losses.shape == TOKENS.shape and not losses.requires_grad
    assert torch.allclose(losses.mean(), expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize_per")
def test_losses_of_a_quantised_head(model: Transformer) -> None:
    plain = model.loss(TOKENS, TARGETS)
    model.output = quantised(model.output)  # type: ignore[assignment]
    expected = F.cross_entropy(model(TOKENS).flatten(0, 1), TARGETS.flatten())
    assert torch.allclose(model.loss(TOKENS, TARGETS), expected, rtol=1e-6)
    assert torch.allclose(model.token_losses(TOKENS, TARGETS).mean(), expected, rtol=1e-6)
    assert abs(expected - plain) > 1e-4


PLACES = [
    "blocks.0.attention.body.query",
    "blocks.0.attention.body.latent",
    "blocks.0.attention.body.key_value",
    "blocks.1.attention.body.output",
    "blocks.0.feed_forward.body.gate_up",
    "blocks.1.feed_forward.body.router",
    "blocks.1.feed_forward.body.shared.down",
    "output",
]


def cached(model: Transformer, tokens: Tensor, first: int) -> Tensor:
    """The last logits, of a network that reads the tokens in two goes."""
    caches = model.new_caches(len(tokens), tokens.shape[1])
    model.forward_cached(tokens[:, :first], caches)
    return model.forward_cached(tokens[:, first:], caches)


def replace(model: Transformer, place: str, change: Callable[[Any], nn.Module]) -> None:
    model.set_submodule(place, change(model.get_submodule(place)))


@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_is_at_work_everywhere(place: str, model: Transformer) -> None:
    model.eval()
    before = model(TOKENS)
    replace(model, place, LoRA)
    logits = model(TOKENS)
    assert (logits - before).abs().max() > 1e-3
    assert torch.allclose(cached(model, TOKENS, 4), logits[:, -1], atol=1e-5)
    model.loss(TOKENS, TARGETS).backward()
    for name, parameter in model.get_submodule(place).named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_flops_count_adapters_and_weights_however_they_are_kept(model: Transformer) -> None:
    flops = model.flops_per_token(100)
    parametrized(model.output)
    assert model.flops_per_token(100) == flops
    replace(model, "blocks.0.attention.body.query", LoRA)
    adapted = model.get_submodule("blocks.0.attention.body.query")
    added = adapted.lora_a.numel() + adapted.lora_b.numel()
    assert model.flops_per_token(100) == flops + 6 * added


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_full_network(kind: str, model: Transformer) -> None:
    for place in PLACES:
        replace(model, place, KINDS[kind])
    model.eval()
    assert torch.allclose(cached(model, TOKENS, 4), model(TOKENS)[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize_per")
def test_generation_of_a_quantised_network(model: Transformer) -> None:
    """Dynamic quantisation has one scale for all tokens of a call, so numbers agree in part."""
    model.eval()
    exact = model(TOKENS)
    for place in PLACES:
        if not place.endswith("router"):
            replace(model, place, quantised)
    logits = model(TOKENS)
    assert 0 < (logits - exact).abs().max() < 0.1 * exact.abs().max()
    assert (cached(model, TOKENS, 4) - exact[:, -1]).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_who_looks_at_a_router_leaves_its_precision(precision: torch.dtype) -> None:
    """Affinities are float32 whatever the network is: a hook or an idle adapter changes nothing."""
    experts = MixtureOfExperts(16, 8, 8, 2, 0).to(precision)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(64, 16).to(precision)
    gates, chosen = experts.route(x)
    seen: list[Tensor] = []
    experts.router.register_forward_hook(lambda *call: seen.append(call[2]))
    idle = LoRA(experts.router)
    nn.init.zeros_(idle.lora_b)
    experts.router = idle.to(precision)  # type: ignore[assignment]
    again = experts.route(x)
    assert torch.equal(again[0], gates) and torch.equal(again[1], chosen)
    assert gates.dtype == seen[0].dtype == torch.float32
    exact = (x.double() @ idle.weight.double().T).sigmoid().gather(1, chosen)
    assert torch.allclose(gates.double(), exact / exact.sum(1, keepdim=True), rtol=1e-5)


def test_what_is_plain(model: Transformer) -> None:
    assert plain_weight(model.output) is model.output.weight
    for kind in KINDS.values():
        assert plain_weight(kind(nn.Linear(4, 4, bias=False))) is None
