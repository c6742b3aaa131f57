"""Folders that transformers reads: written by `export_for_huggingface` or by `save_pretrained`."""

import json
from typing import Any

import pytest
import tokenizers
import torch
from causal_lms import ENGRAM, EXPERTS
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from mhc_lightning.data.token_classes import bind_tokenizer
from mhc_lightning.data.tokenizers import ByteTokenizer, JsonTokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.huggingface import MhcConfig, MhcForCausalLM
from mhc_lightning.huggingface.folders import export_for_huggingface
from mhc_lightning.interchange import export_model, load_exported, open_exported

AutoModel: Any = AutoModelForCausalLM  # its annotations know no models of others
TEXTS = ("Hello, wörld\n\n  日本 🎉 \x00 ' . ,", "", "a" * 3000, " x<|im_end|>\r\n")


def identical(a, b):
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.fixture
def export(build, tmp_path):
    """Exports a byte model of some settings; the folder and the network."""

    def write(tokenizer=None, folder="out", **changes):
        tokenizer = tokenizer or ByteTokenizer()
        model = build(vocab_size=257, **changes)
        sections = model.config.sections
        settings = {"_target_": sections["model"]["class"], **sections["model"]}
        for part in ("connection", "memory"):
            if part in sections:
                settings[part] = {"_target_": sections[part]["class"], **sections[part]}
                del settings[part]["class"]
        del settings["class"]
        export_for_huggingface(
            model.model, tmp_path / folder, settings=settings, tokenizer=tokenizer, step=7
        )
        return tmp_path / folder, model.model

    return write


def test_transformers_reads_an_export(export):
    folder, network = export(connection="SinglePassHyperConnection", memory=ENGRAM, **EXPERTS)
    model, found = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, MhcForCausalLM) and not model.training
    assert not any(found.values())
    identical(network.state_dict(), model.model.state_dict())
    tokens = torch.randint(0, 257, (2, 9))
    assert torch.equal(model(tokens).logits, network(tokens))
    model.train()(tokens, labels=tokens).loss.backward()  # the loads, which no file has, are there
    assert all(m.load.sum() == 2 * 18 for m in model.modules() if hasattr(m, "load"))
    config = AutoConfig.from_pretrained(folder)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (257, 16, 2)
    card = (folder / "README.md").read_text()
    assert "import mhc_lightning.huggingface" in card


def test_our_own_commands_read_an_export_and_what_transformers_saves(export, tmp_path):
    folder, network = export(memory=ENGRAM)
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        exported = open_exported(place)
        assert exported.step == 7 and exported.tokenizer().fingerprint == "bytes-257"
        identical(network.state_dict(), load_exported(place).state_dict())


def test_a_model_whose_tokenizer_is_unknown_is_not_imported(build, tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not say with which tokenizer"):
        open_exported(tmp_path)


def test_connections_stay_float32_in_a_model_of_bfloat16(export):
    folder, network = export(memory=ENGRAM, **EXPERTS)
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    identical(network.bfloat16().state_dict(), model.model.state_dict())
    assert model.model.blocks[0].attention_connection.phi.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    tokens = torch.randint(0, 257, (2, 9))
    assert torch.equal(model(tokens).logits, network(tokens))
    model.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder)
    identical(model.state_dict(), again.state_dict())


def test_shards_are_placed_by_accelerate(build, tmp_path):
    model = build("SinglePassHyperConnection", memory=ENGRAM)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    placed = AutoModel.from_pretrained(tmp_path, device_map="auto")
    tokens = torch.randint(4, 40, (2, 9))
    torch.testing.assert_close(placed(tokens).logits, model(tokens).logits)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(placed.generate(tokens, **settings), model.generate(tokens, **settings))
    assert "import mhc_lightning.huggingface" in (tmp_path / "README.md").read_text()


def test_folders_of_something_else_are_refused_in_a_line(build, export, tmp_path):
    folder, _ = export()
    with pytest.raises(UserError, match="on the disk or in the machine's memory"):
        AutoModel.from_pretrained(folder, device_map={"model": "disk"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="of a llama model, not of an `mhc` model"):
        MhcForCausalLM.from_pretrained(tmp_path / "other")
    (tmp_path / "other/config.json").write_text("{}")
    with pytest.raises(UserError, match="of no model of transformers, not of an `mhc` model"):
        MhcConfig.from_pretrained(tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the weights to load lack model\.norm\.weight"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(UserError, match=r"missing: norm\.weight \[16\]"):
        load_exported(folder)


def test_bytes_are_encoded_and_decoded_alike(export):
    folder, _ = export()
    read, ours = AutoTokenizer.from_pretrained(folder), ByteTokenizer()
    for text in TEXTS:
        assert read(text)["input_ids"] == ours.encode(text).tolist()
        assert read.decode(ours.encode(text).tolist()) == text
    every = list(range(256))
    assert read.decode(every) == ours.decode(every)
    assert read.convert_tokens_to_ids(read.eos_token) == ours.end_of_document == read.eos_token_id
    assert read.bos_token_id == read.pad_token_id == 256 and len(read) == 257
    padded = read(["a", "bc"], padding=True)["input_ids"]
    assert padded == [[256, ord("a")], list(b"bc")], "at the left, for `generate`"
    assert list(read("a")) == ["input_ids", "attention_mask"]


def bpe(folder, **changes):
    """A trained `tokenizer.json` in a folder, changed."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=["<s>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Hello, hello, yellow fellows"] * 9, trainer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("adds", [False, True])
def test_a_tokenizer_travels_and_gives_the_ids_of_training(export, tmp_path, adds):
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    file = bpe(tmp_path / "given", **({"post_processor": begin} if adds else {}))
    file.with_name("tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    ours = JsonTokenizer(file)
    folder, _ = export(ours)
    read = AutoTokenizer.from_pretrained(folder)
    for text in ("Hello, yellow", "", "  fellows\n"):
        assert read(text)["input_ids"] == [*ours.beginning, *ours.encode(text).tolist()]
    assert ours.beginning == ([0] if adds else [])
    assert read.bos_token == ("<s>" if adds else "<|im_end|>")
    assert read.eos_token == "<|im_end|>" and read.eos_token_id == ours.end_of_document
    chat = read.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert chat == "Hello<|im_end|>"
    assert open_exported(folder).tokenizer().fingerprint == ours.fingerprint
    assert (folder / "training_tokenizer").is_dir() == adds


def test_a_pipeline_generates_text(export):
    folder, network = export()
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    prompts = ["def f(x):", "import"]
    found = generate(prompts, max_new_tokens=5, do_sample=False, batch_size=2)
    for prompt, [result] in zip(prompts, found, strict=True):
        tokens = torch.tensor([list(prompt.encode())])
        for _ in range(5):
            token = network(tokens)[0, -1].argmax().view(1, 1)
            tokens = torch.cat([tokens, token], 1)
            if token == 256:
                break
        expected = ByteTokenizer().decode(tokens[0].tolist())
        assert result["generated_text"] == expected


def test_a_memory_stays_bound_to_its_tokenizer(export, build, tmp_path):
    folder, _ = export(memory=ENGRAM)
    model = AutoModel.from_pretrained(folder)
    with pytest.raises(UserError, match="bound to another tokenizer"):
        bind_tokenizer(model.model.memory, ByteTokenizer())


def test_a_form_and_a_tokenizer_that_do_not_fit_leave_nothing_behind(build, tmp_path):
    model = build(vocab_size=257)
    sections = model.config.sections
    settings = {k: v for k, v in sections["model"].items() if k != "class"}
    settings |= {
        "_target_": sections["model"]["class"],
        "connection": {"_target_": sections["connection"]["class"]},
    }
    with pytest.raises(UserError, match="holds something else"):
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken/thesis.tex").touch()
        export_for_huggingface(
            model.model, tmp_path / "taken", settings=settings, tokenizer=ByteTokenizer()
        )
    export_model(model.model, tmp_path / "own", settings=settings, tokenizer=ByteTokenizer())
    identical(load_exported(tmp_path / "own").state_dict(), model.model.state_dict())
