"""Pretrained models as the network of a `LanguageModel`."""

import json
import math
import shutil
import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from networks import CONNECTIONS
from pretrained import relative_difference, some_tokens, tiny_pretrained
from torch.nn.functional import cross_entropy

from mhc_lightning import LanguageModel
from mhc_lightning.callbacks import AmaxGain
from mhc_lightning.errors import UserError
from mhc_lightning.modules import Connection
from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.upcycling import PretrainedNetwork


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small Llama, as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("pretrained") / "llama"
    tiny_pretrained("llama").save_pretrained(path)
    return str(path)


@pytest.fixture
def network(folder):
    return PretrainedNetwork(pretrained=folder, connection=CONNECTIONS["mhc"])


def split(tokens):
    return tokens[:, :-1], tokens[:, 1:].clone()


def test_computes_what_the_pretrained_model_does(network):
    tokens = some_tokens()
    expected = tiny_pretrained("llama")(tokens).logits
    assert relative_difference(network(tokens), expected) < 1e-5
    assert network.vocab_size == expected.shape[-1]
    assert len(network.blocks) == 3 and all(module.training for module in network.modules())


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3"])
def test_losses_are_those_of_the_logits(tmp_path, family):
    tiny_pretrained(family).save_pretrained(tmp_path / family)
    network = PretrainedNetwork(
        pretrained=str(tmp_path / family), connection=CONNECTIONS["mhc_single_pass"]
    )
    inputs, targets = split(some_tokens())
    targets[1, 4:] = -100
    expected = cross_entropy(network(inputs).flatten(0, 1), targets.flatten(), reduction="none")
    losses = network.token_losses(inputs, targets)
    torch.testing.assert_close(losses.flatten(), expected, rtol=1e-5, atol=1e-6)
    assert network.count_targets(targets) == 14
    loss = network.loss(inputs, targets)
    torch.testing.assert_close(loss, expected.sum() / 14, rtol=1e-5, atol=1e-6)


def test_a_model_that_changes_its_logits_has_their_loss(tmp_path):
    """Gemma 2 bounds logits by a tanh behind its output projection."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.5,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    network = PretrainedNetwork(
        pretrained=str(tmp_path / "gemma"), connection=CONNECTIONS["hc"], attention="eager"
    )
    inputs, targets = split(some_tokens())
    expected = cross_entropy(network(inputs).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(network.loss(inputs, targets), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mhc", "mhc_single_pass"])
def test_cached_steps_of_ragged_rows_are_full_passes(folder, name):
    network = PretrainedNetwork(pretrained=folder, connection=CONNECTIONS[name]).eval()
    tokens, lengths = some_tokens(3, 9), [5, 2, 4]
    caches = network.new_caches(3, 9)
    logits = network.forward_cached(tokens[:, :5], caches, torch.tensor(lengths))
    rows = [tokens[k, :length] for k, length in enumerate(lengths)]
    for step in range(3):
        for row, found in zip(rows, logits, strict=True):
            expected = network(row[None])[0, -1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if step == 1:
            for cache in caches:
                cache.keep(torch.tensor([0, 2]))
            rows = [rows[0], rows[2]]
        following = tokens[: len(rows), 6 + step]
        logits = network.forward_cached(following[:, None], caches)
        rows = [torch.cat([row, new[None]]) for row, new in zip(rows, following, strict=True)]


def test_connections_alone_can_learn(folder):
    network = PretrainedNetwork(
        pretrained=folder, connection=CONNECTIONS["mhc"], train="connections"
    )
    own = {p for m in network.modules() if isinstance(m, Connection) for p in m.parameters()}
    assert own == {p for p in network.parameters() if p.requires_grad}
    with pytest.raises(UserError, match="leaves nothing to train"):
        PretrainedNetwork(
            pretrained=folder, connection=CONNECTIONS["residual"], train="connections"
        )
    with pytest.raises(UserError, match="train must be all or connections, not 'some'"):
        PretrainedNetwork(pretrained=folder, connection=CONNECTIONS["hc"], train="some")


def test_recomputes_whole_blocks(network):
    assert network.set_recompute("auto") == 0
    assert network.network.is_gradient_checkpointing
    network.set_recompute("off")
    assert not network.network.is_gradient_checkpointing
    with pytest.raises(UserError, match="recompute=4 is not possible with a pretrained model"):
        network.set_recompute(4)


@pytest.mark.parametrize("recompute", ["off", "auto"])
def test_a_language_model_trains_it_and_goes_on(tmp_path, folder, recompute):
    rows = [torch.cat([row, row[:1]]) for row in some_tokens(16, 12)]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=4)  # type: ignore[arg-type]

    def fit(steps, **options):
        network: Any = PretrainedNetwork(pretrained=folder, connection=CONNECTIONS["mhc"])
        recipe = AdamWRecipe(lr=1e-2, warmup_steps=0, schedule="constant")
        module = LanguageModel(network, recipe, recompute=recompute)
        gains = AmaxGain(every_n_steps=1)
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, callbacks=[gains],
        )  # fmt: skip
        trainer.fit(module, loader, loader, **options)
        return module, trainer, gains

    _, trainer, gains = fit(4)
    assert trainer.callback_metrics["val/loss"] < math.log(61)
    assert "amax_gain/single/forward/layer_5" in gains.last
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    straight, *_ = fit(8)
    resumed, *_ = fit(8, ckpt_path=tmp_path / "four.ckpt")
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


@torch.no_grad()
def test_a_checkpoint_alone_rebuilds_it(tmp_path):
    """Without the pretrained model, of which a checkpoint keeps the configuration."""
    tiny_pretrained("qwen3").save_pretrained(tmp_path / "gone")
    network = PretrainedNetwork(
        pretrained=str(tmp_path / "gone"), connection=CONNECTIONS["mhc"], num_streams=2,
        train="connections", attention="eager",
    )  # fmt: skip
    for parameter in network.parameters():
        parameter.add_(0.01)
    module = LanguageModel(network, AdamWRecipe(lr=1e-2))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    shutil.rmtree(tmp_path / "gone")
    again = LanguageModel.load_from_checkpoint(tmp_path / "module.ckpt")
    tokens = some_tokens()
    assert torch.equal(again.eval()(tokens), module.eval()(tokens))
    assert again.model.network.config._attn_implementation == "eager"
    for one, other in zip(network.parameters(), again.model.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
    record = dict(again.hparams_initial["model"])
    record["architecture"] = {**record["architecture"], "model_type": "unheard"}
    with pytest.raises(UserError, match="does not build the model of the checkpoint"):
        PretrainedNetwork(
            pretrained="gone", connection=CONNECTIONS["mhc"], architecture=record["architecture"]
        )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{}/nothing", "cannot be read as a causal language model"),
        ("{}/nothing.gguf", "is not there; give a GGUF file that is"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, source, words):
    with pytest.raises(UserError, match=words):
        PretrainedNetwork(pretrained=source.format(tmp_path), connection=CONNECTIONS["mhc"])


def refuse(path, words):
    with pytest.raises(UserError, match=words) as caught:
        PretrainedNetwork(pretrained=str(path), connection=CONNECTIONS["mhc"])
    assert "\n" not in str(caught.value)


def change_config(folder, **changes):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **changes}))


def test_weights_that_do_not_fit_are_named_and_none_are_drawn(tmp_path, folder):
    larger, deeper, cut = (tmp_path / name for name in ("larger", "deeper", "cut"))
    for path in (larger, deeper, cut):
        shutil.copytree(folder, path)
    change_config(larger, intermediate_size=48)
    refuse(larger, r"weights model.layers.0.mlp.down_proj.weight of shape \[32, 40\], .*\[32, 48\]")
    change_config(deeper, num_hidden_layers=4, layer_types=None)
    refuse(deeper, r"lacks 9 weights of a causal language model, such as model\.layers\.3\.")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refuse(cut, "cannot be read as a causal language model")


def test_a_damaged_gguf_file_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(UserError, match="cannot be read as a causal language model"):
        PretrainedNetwork(pretrained=str(tmp_path / "model.gguf"), connection=CONNECTIONS["mhc"])


@pytest.mark.parametrize("missing", ["transformers", "gguf"])
def test_without_a_library_the_extra_is_named(tmp_path, monkeypatch, missing):
    import transformers

    def without_gguf(*_, **__):
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint")

    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    if missing == "transformers":
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", without_gguf)
    with pytest.raises(UserError, match=r"pip install \"mhc-lightning\[huggingface\]\""):
        PretrainedNetwork(pretrained=str(tmp_path / "model.gguf"), connection=CONNECTIONS["mhc"])
