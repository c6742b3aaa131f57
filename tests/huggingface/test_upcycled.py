"""Upcycled models of transformers are saved, and come back as what they were."""

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
from networks import scrambled
from peft import LoraConfig, get_peft_model
from pretrained import DECODERS, some_tokens, tiny_pretrained
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mhc_lightning.data.tokenizers import ByteTokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.huggingface import MhcConfig, MhcForCausalLM
from mhc_lightning.huggingface.folders import export_upcycled
from mhc_lightning.interchange import open_exported
from mhc_lightning.modules import (
    HyperConnection,
    ManifoldHyperConnection,
    SinglePassHyperConnection,
)
from mhc_lightning.upcycling import upcycle

AutoModel: Any = AutoModelForCausalLM  # its annotations know no models of others
CONNECTIONS: dict[str, Any] = {
    "mhc": partial(ManifoldHyperConnection, sinkhorn_iterations=7, eps=1e-6),
    "single_pass": SinglePassHyperConnection,
    "hc": partial(HyperConnection, tanh=False),
}


def upcycled(family: str = "llama", connection: str = "mhc", **changes: Any) -> Any:
    """A model whose connections have moved from where they start, and the model around it."""
    wide = upcycle(tiny_pretrained(family, **changes), CONNECTIONS[connection], 3)
    connections = [m for m in wide.modules() if hasattr(m, "layer_index")]
    for number, each in enumerate(connections):
        scrambled(each, 0.1, seed=number)
    return wide, MhcForCausalLM.from_upcycled(wide)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


KINDS = [*((family, "mhc") for family in DECODERS), ("llama", "single_pass"), ("qwen2", "hc")]


@pytest.mark.parametrize(("family", "connection"), KINDS)
def test_a_model_comes_back_with_its_caches(tmp_path, family, connection):
    wide, model = upcycled(family, connection)
    tokens = some_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0  # a shorter prompt, padded at the left
    out = model(tokens, labels=tokens, attention_mask=mask)
    expected = wide(tokens, labels=tokens, attention_mask=mask)
    assert torch.equal(out.logits, expected.logits) and out.loss == expected.loss
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    back, found = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(back, MhcForCausalLM) and not any(found.values())
    assert back.config.num_hidden_layers == 3 and back.config.max_position_embeddings == 64
    state, again = wide.state_dict(), back.model.state_dict()
    assert list(state) == list(again)
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    close(back(tokens, attention_mask=mask).logits, out.logits)
    models: list[Any] = [wide, model, back]
    more = ({"num_beams": 2}, {"use_cache": False}) if family == "llama" else ()
    for settings in ({}, *more):
        settings = {"max_new_tokens": 6, "do_sample": False, **settings}
        texts = [m.generate(tokens, attention_mask=mask, **settings) for m in models]
        assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_dtype_attention_and_generation_settings_come_along(tmp_path):
    wide, model = upcycled(tie_word_embeddings=True)
    model.generation_config.max_new_tokens = 7
    model.bfloat16().save_pretrained(tmp_path)
    back = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    dtypes = {name: tensor.dtype for name, tensor in back.model.state_dict().items()}
    assert dtypes == {name: tensor.dtype for name, tensor in wide.state_dict().items()}
    assert dtypes["model.layers.0.connections.0.phi"] == torch.float32
    assert back.dtype == torch.bfloat16
    assert back.model.config._attn_implementation == "eager"
    assert back.generation_config.max_new_tokens == 7
    assert back.get_input_embeddings().weight is back.get_output_embeddings().weight


def test_training_with_checkpoints_and_an_adapter(tmp_path):
    wide, model = upcycled()
    tokens = some_tokens()
    plain = copy.deepcopy(model).train()
    model.train().activation_checkpointing_enable()
    assert any(getattr(m, "gradient_checkpointing", False) for m in wide.modules())
    for each in (plain, model):
        each(tokens, labels=tokens).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    adapted = get_peft_model(plain.eval(), settings)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 6 and all("lora_" in name for name in trained)
    close(adapted(input_ids=tokens).logits, model.eval()(tokens).logits)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    close(AutoModel.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def test_the_vocabulary_grows(tmp_path):
    _, model = upcycled("llama_tied")
    tokens = some_tokens()
    before = model(tokens).logits
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    back = AutoModel.from_pretrained(tmp_path)
    assert back.config.vocab_size == back.vocab_size == 70
    close(back(tokens).logits[..., :61], before)


def test_a_network_of_our_own_comes_back_with_new_connections(build, tmp_path):
    model = upcycle(build("ResidualConnection"), CONNECTIONS["mhc"], 3)
    with pytest.raises(UserError, match=r"has ManifoldHyperConnections, and .* Residual.*from_up"):
        model.save_pretrained(tmp_path)
    MhcForCausalLM.from_upcycled(model).save_pretrained(tmp_path)
    back = AutoModel.from_pretrained(tmp_path)
    assert back.config.network["connection"]["sinkhorn_iterations"] == 7
    tokens = torch.randint(4, 40, (2, 9))
    assert torch.equal(back(tokens).logits, model(tokens).logits)


def test_an_export_has_the_tokenizer_of_the_pretrained_model(tmp_path):
    wide, _ = upcycled(vocab_size=257)
    given = tmp_path / "given"
    wide.config.save_pretrained(given)
    export_upcycled(wide, tmp_path / "a", pretrained=str(given), tokenizer=ByteTokenizer())
    read = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert read("ab")["input_ids"] == [97, 98], "that of the data, as there is no other"
    ends = AutoModel.from_pretrained(tmp_path / "a").generation_config.eos_token_id
    assert ends == [2, 256], "the model's, and that of the documents"
    read.add_special_tokens({"cls_token": "a"})
    read.save_pretrained(given)
    more: dict[str, Any] = {"shard_bytes": 30_000, "overwrite": True}
    export_upcycled(wide, tmp_path / "a", pretrained=str(given), tokenizer=ByteTokenizer(), **more)
    assert AutoTokenizer.from_pretrained(tmp_path / "a").cls_token == "a"
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    tokens = some_tokens()
    close(AutoModel.from_pretrained(tmp_path / "a")(tokens).logits, wide(tokens).logits)
    with pytest.raises(UserError, match="already holds a model"):
        export_upcycled(wide, tmp_path / "a", pretrained=str(given), tokenizer=ByteTokenizer())


class Nameless(ManifoldHyperConnection):
    def __init__(self, dim, num_streams=4, layer_index=0, secret=3):
        super().__init__(dim, num_streams, layer_index)


def test_what_cannot_be_saved_or_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="this LlamaForCausalLM is no upcycled causal language"):
        MhcForCausalLM.from_upcycled(tiny_pretrained())
    with pytest.raises(UserError, match="this LlamaModel is no upcycled causal language"):
        MhcForCausalLM.from_upcycled(upcycle(tiny_pretrained().model))
    with pytest.raises(UserError, match="does not keep its argument secret as an attribute"):
        MhcForCausalLM.from_upcycled(upcycle(tiny_pretrained(), Nameless))
    _, model = upcycled()
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is an upcycled Llama"):
        open_exported(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"base": {"model_type": "future"}}, "of the type future, which this transformers"),
        ({"connection": {"class": "torch.nn.Linear"}}, "names torch.nn.Linear, which is no Conn"),
    ]
    for change, said in changes:
        upcycled_part = {**record["upcycled"], **change}
        text = json.dumps({**record, "upcycled": upcycled_part})
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=said):
            AutoModel.from_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MhcConfig)
