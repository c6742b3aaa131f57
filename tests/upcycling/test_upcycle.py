"""`upcycle`: the wide model computes the same function, and stays the same object."""

import copy
import io
from typing import Any

import pytest
import torch
from networks import CONNECTIONS, tiny_transformer
from pretrained import DECODERS, in_float64, relative_difference, some_tokens, tiny_pretrained
from torch import nn

from mhc_lightning.modules import Connection, ManifoldHyperConnection
from mhc_lightning.upcycling import WideBlock, upcycle

CASES = [("llama", name) for name in CONNECTIONS] + [
    (family, name)
    for family in DECODERS
    if family != "llama"
    for name in ("mhc", "mhc_single_pass")
]


def connections_in(model: nn.Module) -> list[Connection]:
    return [module for module in model.modules() if isinstance(module, Connection)]


@pytest.mark.parametrize(("family", "name"), CASES)
@torch.no_grad()
def test_logits_and_continuations_are_those_of_the_model(family: str, name: str) -> None:
    model, tokens = tiny_pretrained(family), some_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0  # padding on the left
    reference = in_float64(model)(tokens, attention_mask=mask).logits
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "attention_mask": mask}
    continued = model.generate(tokens, **settings)
    hidden = model(tokens, output_hidden_states=True).hidden_states

    wide = upcycle(model, connection=CONNECTIONS[name])
    assert wide is model
    out = wide(tokens, attention_mask=mask, use_cache=True)
    assert relative_difference(out.logits, reference) < 1e-5
    assert torch.equal(wide.generate(tokens, **settings), continued)
    assert torch.equal(wide.generate(tokens, use_cache=False, **settings), continued)
    # A part of the tokens after another, from a cache.
    first = wide(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True)
    rest = wide(tokens[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    assert relative_difference(rest.logits, reference[:, 6:]) < 1e-5
    streams = wide(tokens, output_hidden_states=True).hidden_states
    assert len(streams) == len(hidden)
    for state, expected in zip(streams[1:-1], hidden[1:-1], strict=True):
        assert relative_difference(state.mean(-2), expected) < 1e-5
    for k in (0, -1):
        assert streams[k].shape == hidden[k].shape


@pytest.mark.parametrize("name", CONNECTIONS)
@torch.no_grad()
def test_in_float64_the_difference_is_rounding(name: str) -> None:
    model, tokens = tiny_pretrained().double(), some_tokens()
    reference = model(tokens).logits
    upcycle(model, connection=CONNECTIONS[name])
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    # Sinkhorn's rows, softmax and σ: float64 throughout.
    assert relative_difference(model(tokens).logits, reference) < 1e-13


@pytest.mark.parametrize(
    "attention",
    ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)],  # is compiled
)
@torch.no_grad()
def test_implementations_of_attention(attention: str) -> None:
    model, tokens = tiny_pretrained(attn_implementation=attention), some_tokens()
    before = model(tokens, output_attentions=attention == "eager")
    upcycle(model, num_streams=2)
    after = model(tokens, output_attentions=attention == "eager")
    assert relative_difference(after.logits, before.logits) < 1e-5
    for wide, plain in zip(after.attentions or (), before.attentions or (), strict=True):
        assert relative_difference(wide, plain) < 1e-5
    assert len(after.attentions or ()) == (3 if attention == "eager" else 0)


@pytest.mark.parametrize("name", ["mhc", "mhc_single_pass"])
@torch.no_grad()
def test_names_modes_and_types_are_kept(name: str) -> None:
    model = tiny_pretrained("llama_tied").train()
    model.model.layers[1].eval()
    before, blocks = model.state_dict(), list(model.model.layers)
    classes = [type(block) for block in blocks]
    upcycle(model, connection=CONNECTIONS[name])
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    new = [key for key in after if key not in before]
    assert new[0] == "model.layers.0.connections.0.phi"
    assert all(".connections." in key for key in new)
    assert [block.training for block in blocks] == [True, False, True]
    for block, cls in zip(blocks, classes, strict=True):
        assert issubclass(type(block), cls) and issubclass(type(block), WideBlock)
        assert type(block).__name__ == cls.__name__
        assert all(m.training == block.training for m in block.modules())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [c.layer_index for c in connections_in(model)] == list(range(6))


@pytest.mark.parametrize("name", ["mhc", "mhc_single_pass", "hc"])
@torch.no_grad()
def test_copies_pickles_and_state_dicts(name: str) -> None:
    model, tokens = upcycle(tiny_pretrained(), connection=CONNECTIONS[name]), some_tokens()
    for connection in connections_in(model):
        for parameter in connection.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    expected = model(tokens).logits
    assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    assert torch.equal(read(tokens).logits, expected)
    assert type(read.model.layers[0]) is type(model.model.layers[0])
    other = upcycle(tiny_pretrained(), connection=CONNECTIONS[name])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens).logits, expected)


@pytest.mark.parametrize("name", CONNECTIONS)
@torch.no_grad()
def test_a_transformer_of_this_package(name: str) -> None:
    model = tiny_transformer("residual")
    tokens = some_tokens() % 40
    reference = copy.deepcopy(model).double()(tokens)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert upcycle(model, connection=CONNECTIONS[name], num_streams=2) is model
    assert relative_difference(model(tokens), reference) < 1e-5
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [c.layer_index for c in connections_in(model)] == [0, 1, 2, 3]
    assert model.num_streams == connections_in(model)[0].num_streams
    caches = model.new_caches(2, 16)
    cached = model.forward_cached(tokens, caches)
    assert relative_difference(cached, reference[:, -1]) < 1e-5


def encoder_layer(block: Any, x: Any, connect: Any, src_mask: Any = None, **_: Any) -> Any:
    x = connect(0, x, lambda u: block._sa_block(block.norm1(u), src_mask, None))
    return connect(1, x, lambda u: block._ff_block(block.norm2(u)))


@pytest.mark.parametrize("name", ["mhc", "mhc_single_pass"])
@torch.no_grad()
def test_any_module_whose_sub_layers_are_named(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, norm_first=True, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)})
    x, mask = torch.randn(2, 5, 16), nn.Transformer.generate_square_subsequent_mask(5)
    model.eval()
    reference = copy.deepcopy(model).double()["encoder"](x.double(), mask.double())
    upcycle(
        model,
        connection=CONNECTIONS[name],
        blocks="encoder.layers",
        forward=encoder_layer,
        dim=16,
    )
    assert relative_difference(model["encoder"](x, mask), reference) < 1e-5
    assert relative_difference(copy.deepcopy(model)["encoder"](x, mask), reference) < 1e-5


def test_a_model_without_values_gets_connections_without_values() -> None:
    with torch.device("meta"):
        model = tiny_pretrained()
    upcycle(model, connection=ManifoldHyperConnection)
    assert {p.device.type for p in model.parameters()} == {"meta"}
