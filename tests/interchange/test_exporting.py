"""An exported model comes back bit for bit, or is refused by name."""

import json
import os

import huggingface_hub
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from mhc_lightning.data.tokenizers import ByteTokenizer, JsonTokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.interchange import (
    export_model,
    import_model,
    load_exported,
    open_exported,
    weights_checkpoint,
)

TOKENS = torch.arange(24).view(2, 12)
MOE = {"num_experts": 4, "num_active_experts": 2, "num_shared_experts": 1}
CONNECTIONS = {
    "mhc": {"_target_": "mhc_lightning.modules.ManifoldHyperConnection", "sinkhorn_iterations": 7},
    "hc": {"_target_": "mhc_lightning.modules.HyperConnection", "tanh": False},
    "krom": {"_target_": "mhc_lightning.modules.KroneckerHyperConnection"},
    "residual": {"_target_": "mhc_lightning.modules.ResidualConnection"},
}


def identical(a, b):
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def export(model, folder, settings, **options):
    export_model(model, folder, settings=settings, tokenizer=ByteTokenizer(), **options)


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_a_model_comes_back_bit_for_bit(tmp_path, settings, network, connection):
    settings = {**settings, **MOE, "connection": CONNECTIONS[connection], "rope_theta": 500.0}
    model = network(settings)
    export(model, tmp_path / "out", settings, step=12)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
    random = torch.get_rng_state()
    back = load_exported(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), random), "loading draws nothing"
    identical(model.state_dict(), back.state_dict())
    assert not back.training
    assert all(not buffer.is_meta for buffer in back.buffers())
    assert torch.equal(model(TOKENS), back(TOKENS)), "settings without tensors come along, too"
    exported = open_exported(tmp_path / "out")
    assert exported.step == 12 and exported.tokenizer().fingerprint == "bytes-257"
    other = network(settings)
    import_model(tmp_path / "out", other)
    identical(model.state_dict(), other.state_dict())
    back.train()(TOKENS)  # its loads can be counted


def test_bfloat16_weights_stay_bfloat16_beside_float32_connections(tmp_path, settings, network):
    model = network(settings).bfloat16()
    export(model, tmp_path / "out", settings)
    back = load_exported(tmp_path / "out")
    identical(model.state_dict(), back.state_dict())
    assert back.embedding.weight.dtype == torch.bfloat16
    assert back.blocks[0].attention_connection.phi.dtype == torch.float32


def test_large_models_are_sharded_as_hugging_face_reads_them(tmp_path, settings, network):
    model = network(settings)
    export(model, tmp_path / "out", settings, shard_bytes=9000)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    state = model.state_dict()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    for file in files:
        held = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in held)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 9000
    identical(state, load_exported(tmp_path / "out").state_dict())
    other = network(settings)
    huggingface_hub.load_torch_model(other, tmp_path / "out", strict=True)
    identical(state, other.state_dict())

    files[1].unlink()
    with pytest.raises(UserError, match=f"incomplete.*{files[1].name}"):
        load_exported(tmp_path / "out")


def test_tensors_that_do_not_fit_are_named(tmp_path, settings, network):
    export(network(settings), tmp_path / "out", settings)
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    del tensors["blocks.0.attention_connection.alpha"]
    tensors["norm.weight"] = torch.ones(17)
    tensors["stray.weight"] = torch.ones(2, 3)
    save_file(tensors, file)
    model = network(settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported = open_exported(tmp_path / "out")
    lightning = {f"model.{name}": tensor for name, tensor in before.items()}
    for attempt in (
        lambda: load_exported(tmp_path / "out"),
        lambda: import_model(tmp_path / "out", model),
        lambda: weights_checkpoint(exported, lightning),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        for text in (
            "missing: blocks.0.attention_connection.alpha [3]",
            "not in the model: stray.weight [2, 3]",
            "of another shape: norm.weight is [17], not [16]",
        ):
            assert text in str(caught.value)
    identical(before, model.state_dict())


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 1])
def test_tied_weights_are_each_written(tmp_path, settings, network, shard_bytes):
    model = network(settings)
    model.output.weight = model.embedding.weight
    export(model, tmp_path / "out", settings, shard_bytes=shard_bytes)
    back = load_exported(tmp_path / "out")
    identical(model.state_dict(), back.state_dict())
    assert torch.equal(model(TOKENS), back(TOKENS))


def test_quantised_weights_are_refused_both_ways(tmp_path, settings, network):
    model = network(settings)
    export(model, tmp_path / "out", settings)
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool, torch.int64):
        changed = {**tensors, "output.weight": tensors["output.weight"].to(dtype)}
        with pytest.raises(
            UserError, match=r"holds a tensor that is no plain weight, output\.weight"
        ):
            export(changed, tmp_path / "other", settings)
        save_file(changed, file)
        for attempt in (
            lambda: load_exported(tmp_path / "out"),
            lambda: import_model(tmp_path / "out", model),
        ):
            with pytest.raises(UserError, match=r"output\.weight.*quantised weights are not read"):
                attempt()
    packed = {**tensors, "output.dtype": torch.qint8}
    with pytest.raises(UserError, match=r"output\.dtype \(is it quantised\?\)"):
        export(packed, tmp_path / "other", settings)
    assert os.listdir(tmp_path) == ["out"]


def test_a_tensor_in_two_files_is_refused(tmp_path, settings, network):
    export(network(settings), tmp_path / "out", settings, shard_bytes=1)
    first, second, *_ = sorted((tmp_path / "out").glob("model-*.safetensors"))
    both = load_file(first)
    save_file({**{name: torch.zeros_like(both[name]) for name in both}, **load_file(second)},
              second)  # fmt: skip
    with pytest.raises(UserError, match=f"holds {next(iter(both))} twice"):
        load_exported(tmp_path / "out")


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        (None, {"step": float("inf")}, "is incomplete"),
        ("model", {"class": ...}, "model names no class"),
        ("connection", {"class": ...}, "connection names no class"),
        ("model", {"vocab_size": 10**30}, "does not fit this version: [^\n]*$"),
    ],
)
def test_a_damaged_record_is_refused_in_a_line(tmp_path, settings, network, section, change, said):
    export(network(settings), tmp_path / "out", settings)
    file = tmp_path / "out/config.json"
    record = json.loads(file.read_text())
    del record["checksum"]  # as of an earlier version, or edited by hand
    part = record if section is None else record[section]
    part |= change
    for name in [name for name in part if part[name] is ...]:
        del part[name]
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=said):
        load_exported(tmp_path / "out")


def test_a_cut_file_is_refused(tmp_path, settings, network):
    export(network(settings), tmp_path / "out", settings)
    file = tmp_path / "out/model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"model\.safetensors is not a complete safetensors file"):
        load_exported(tmp_path / "out")


def test_the_tokenizer_comes_along_and_is_checked(tmp_path, settings, network):
    vocabulary = {"a": 0, "b": 1, "[UNK]": 2, "<eos>": 3}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    model = network(settings)
    export_model(model, tmp_path / "out", settings=settings, tokenizer=tokenizer)
    back = open_exported(tmp_path / "out").tokenizer()
    assert isinstance(back, JsonTokenizer)
    assert back.fingerprint == tokenizer.fingerprint
    assert back.path == tmp_path / "out/tokenizer.json"
    (tmp_path / "out/tokenizer.json").write_text(back.path.read_text() + "\n")
    with pytest.raises(UserError, match="is not the tokenizer"):
        open_exported(tmp_path / "out").tokenizer()

    settings["vocab_size"] = 3
    with pytest.raises(UserError, match="the tokenizer has 4 ids and the model 3"):
        export_model(network(settings), tmp_path / "x", settings=settings, tokenizer=tokenizer)
    assert not (tmp_path / "x").exists()


def test_an_output_is_replaced_only_when_told_to(tmp_path, settings, network):
    first, second = network(settings), network(settings)
    export(first, tmp_path / "out", settings)
    with pytest.raises(UserError, match=r"already holds a model.*overwrite=true"):
        export(second, tmp_path / "out", settings)
    identical(first.state_dict(), load_exported(tmp_path / "out").state_dict())
    export(second, tmp_path / "out", settings, overwrite=True)
    identical(second.state_dict(), load_exported(tmp_path / "out").state_dict())

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        export(first, tmp_path / "mine", settings, overwrite=True)
    assert (tmp_path / "mine/thesis.tex").read_text() == "precious"


def test_an_export_that_fails_leaves_what_was_there(tmp_path, settings, network, monkeypatch):
    first = network(settings)
    export(first, tmp_path / "out", settings)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        export(network(settings), tmp_path / "out", settings, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    identical(first.state_dict(), load_exported(tmp_path / "out").state_dict())


def test_settings_of_another_model_are_refused(tmp_path, settings, network):
    model = network(settings)
    with pytest.raises(UserError, match=r"the model to export.*embedding\.weight"):
        export(model, tmp_path / "out", {**settings, "dim": 32})
    assert not (tmp_path / "out").exists()


def test_a_record_can_build_nothing_but_networks(tmp_path, settings, network):
    export(network(settings), tmp_path / "out", settings)
    file = tmp_path / "out/config.json"
    record = json.loads(file.read_text())
    del record["checksum"]  # whoever changes a record would
    for section, name, reason in (
        ("model", "os.system", "no Transformer"),
        ("connection", "torch.nn.Linear", "no Connection"),
        ("connection", "nowhere.Connection", "cannot be imported"),
    ):
        changed = {**record, section: {**record[section], "class": name}}
        file.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"{name}.*{reason}"):
            load_exported(tmp_path / "out")
    file.write_text(json.dumps({**record, "model": {**record["model"], "depth": 3}}))
    with pytest.raises(UserError, match="depth"):
        load_exported(tmp_path / "out")
    file.write_text(json.dumps({**record, "format_version": 2}))
    with pytest.raises(UserError, match="is of format 2, and this version reads 1"):
        load_exported(tmp_path / "out")
    with pytest.raises(UserError, match="holds no exported model"):
        load_exported(tmp_path)


@pytest.mark.parametrize("shard_bytes", [9000, 10**9])
def test_a_changed_byte_is_noticed(tmp_path, settings, network, shard_bytes):
    folder = tmp_path / "out"
    export(network(settings), folder, settings, shard_bytes=shard_bytes)
    assert open_exported(folder).files.keys() == {f.name for f in folder.glob("*.safetensors")}
    for file in (*folder.glob("*.safetensors"), folder / "config.json"):
        content = file.read_bytes()
        place = content.index(b'"step": 0') + 8 if file.suffix == ".json" else len(content) - 1
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=f"{file.name} is damaged, or was changed"):
            load_exported(folder)
        file.write_bytes(content)
    load_exported(folder)
    record = json.loads((folder / "config.json").read_text())
    del record["files"], record["checksum"]  # as earlier versions wrote it
    (folder / "config.json").write_text(json.dumps(record))
    load_exported(folder)


def test_weights_in_other_files_than_were_exported_are_refused_in_a_line(
    tmp_path, settings, network
):
    folder = tmp_path / "out"
    export(network(settings), folder, settings, shard_bytes=9000)
    shards = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    for file in shards:
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{shards[0].name} was removed since `export` wrote it"):
        load_exported(folder)
