"""Connections in DeepSeek-V4's layout compute what transformers' model computes."""

import pytest
import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4ForCausalLM,
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
)

from mhc_lightning.errors import UserError
from mhc_lightning.interchange.deepseek_v4 import (
    DeepseekV4Settings,
    connection_from_deepseek_v4,
    connection_to_deepseek_v4,
    from_deepseek_v4,
    to_deepseek_v4,
)
from mhc_lightning.modules import ManifoldHyperConnection

N, DIM = 4, 16


def randomised(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # Coefficients of a few units: the projected, normalised streams have a norm of 8.
            parameter.normal_(std=1 / 8 if name in ("fn", "phi") else 1)
    return module


def v4_config(**changes):
    return DeepseekV4Config(
        hidden_size=DIM,
        hc_mult=N,
        num_hidden_layers=2,
        vocab_size=64,
        num_attention_heads=2,
        head_dim=16,
        q_lora_rank=8,
        o_groups=2,
        o_lora_rank=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        **{"rms_norm_eps": 1e-6, **changes},
    )


@pytest.fixture
def v4_names():
    """Names of everything of the connections in transformers' V4 model."""
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(v4_config())
    return {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if "_hc." in name or "hc_head" in name
    }


@pytest.mark.parametrize(("hc_eps", "tolerance"), [(0.0, 5e-6), (1e-6, 1e-4)])
def test_transformers_connection_computes_the_same_with_our_weights(hc_eps, tolerance):
    ours = randomised(ManifoldHyperConnection(DIM, N, 0, eps=1e-6))
    theirs = DeepseekV4HyperConnection(v4_config(hc_eps=hc_eps))
    theirs.load_state_dict(connection_to_deepseek_v4(ours))
    streams = torch.randn(2, 5, N, DIM)
    post, comb, collapsed = theirs(streams)
    mappings = ours.mappings(streams)
    assert (mappings.post - post).abs().max() < tolerance
    assert (mappings.residual - comb.mT).abs().max() < tolerance
    assert (mappings.residual - comb).abs().max() > 0.1, "a forgotten transposition would show"
    assert (ours.read(streams)[0] - collapsed).abs().max() < 10 * tolerance


def test_their_weights_come_in_and_go_out_again_bit_for_bit():
    theirs = randomised(DeepseekV4HyperConnection(v4_config()))
    ours = ManifoldHyperConnection(DIM, N, 0, eps=1e-6)
    connection_from_deepseek_v4(ours, theirs.state_dict())
    streams = torch.randn(3, 2, N, DIM)
    post, comb, _ = theirs(streams)
    assert (ours.mappings(streams).residual - comb.mT).abs().max() < 1e-4
    assert (ours.mappings(streams).post - post).abs().max() < 1e-4
    back = connection_to_deepseek_v4(ours)
    assert set(back) == set(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back[name], tensor) and back[name].dtype == torch.float32


def test_a_whole_network_has_the_names_and_shapes_of_transformers_model(
    settings, network, v4_names
):
    tensors, record = to_deepseek_v4(network(settings), transformers_names=True)
    assert {f"model.{name}": tensor.shape for name, tensor in tensors.items()} == v4_names
    assert record == DeepseekV4Settings(N, 20, hc_eps=0.0, rms_norm_eps=1e-20)


@pytest.mark.parametrize("transformers_names", [True, False])
def test_a_whole_network_goes_round(settings, network, transformers_names):
    settings["connection"]["eps"] = 1e-6
    first, second = network(settings), network(settings)
    tensors, record = to_deepseek_v4(first, transformers_names=transformers_names)
    assert ("layers.1.hc_ffn_fn" in tensors) is not transformers_names
    prefix = "model." if transformers_names else ""
    named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    from_deepseek_v4(second, {**named, f"{prefix}norm.weight": torch.ones(DIM)}, record)
    for ours, theirs in zip(first.blocks, second.blocks, strict=True):
        for part in ("attention_connection", "feed_forward_connection"):
            own, other = (getattr(block, part).state_dict() for block in (ours, theirs))
            assert all(torch.equal(own[name], other[name]) for name in own)
    assert not torch.equal(first.norm.weight, second.norm.weight), "the rest stays"


def test_the_exported_head_reads_the_streams_mean(settings, network):
    tensors, _ = to_deepseek_v4(network(settings))
    head = DeepseekV4HyperHead(v4_config(hc_eps=0.0))
    head.load_state_dict({f"hc_{k}": tensors[f"hc_head_{k}"] for k in ("fn", "base", "scale")})
    streams = torch.randn(2, 3, N, DIM)
    assert torch.allclose(head(streams), streams.mean(-2), atol=1e-6)


def test_a_head_that_weighs_the_streams_is_refused(settings, network):
    settings["connection"]["eps"] = 1e-6
    model = network(settings)
    tensors, record = to_deepseek_v4(model)
    for name, value in (("base", torch.arange(4.0)), ("fn", torch.randn(N, N * DIM))):
        changed = {**tensors, "hc_head_scale": torch.ones(1), f"hc_head_{name}": value}
        with pytest.raises(UserError, match="hc_head_fn"):
            from_deepseek_v4(model, changed, record)
    without = {name: t for name, t in tensors.items() if not name.startswith("hc_head")}
    from_deepseek_v4(model, without, record)


def test_what_does_not_fit_is_named(settings, network):
    model = network(settings)
    tensors, record = to_deepseek_v4(model)
    del tensors["layers.0.hc_attn_base"]
    tensors["layers.1.hc_ffn_fn"] = torch.zeros(24, 60)
    tensors["layers.2.hc_ffn_scale"] = torch.zeros(3)
    with pytest.raises(UserError) as caught:
        from_deepseek_v4(model, tensors, record)
    for text in (
        "missing: layers.0.hc_attn_base [24]",
        "layers.1.hc_ffn_fn is [24, 60], not [24, 64]",
        "not in the model: layers.2.hc_ffn_scale [3]",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize("name", ["layers.0.hc_attn_fn", "layers.1.hc_ffn_base", "hc_head_base"])
def test_values_that_would_be_other_ones_are_refused(settings, network, name):
    model = network(settings)
    tensors, record = to_deepseek_v4(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for dtype in (torch.int8, torch.float8_e4m3fn):
        changed = {**tensors, name: tensors[name].to(dtype)}
        with pytest.raises(UserError, match=f"{name} is {dtype}: quantised"):
            from_deepseek_v4(model, changed, record)
    for value in (float("nan"), float("inf")):
        changed = {**tensors, name: torch.full_like(tensors[name], value)}
        with pytest.raises(UserError, match=f"{name} .*not finite"):
            from_deepseek_v4(model, changed, record)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_epsilons_of_the_released_models_are_asked_for(settings, network):
    tensors, _ = to_deepseek_v4(network(settings))
    with pytest.raises(UserError, match=r"connection\.eps is 1e-20.*connection\.eps=1e-06"):
        from_deepseek_v4(network(settings), tensors)


def test_other_connections_have_no_such_layout(settings, network):
    settings["connection"] = {"_target_": "mhc_lightning.modules.HyperConnection"}
    with pytest.raises(UserError, match=r"connection=mhc.*HyperConnection"):
        to_deepseek_v4(network(settings))
