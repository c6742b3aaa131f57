"""Exported models with a memory: whole, readable by other programs, and refused by name."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

from mhc_lightning.data.token_classes import bind_tokenizer
from mhc_lightning.data.tokenizers import ByteTokenizer
from mhc_lightning.errors import UserError
from mhc_lightning.interchange import (
    export_model,
    import_model,
    load_exported,
    open_exported,
    weights_checkpoint,
)
from mhc_lightning.interchange.deepseek_v4 import from_deepseek_v4, to_deepseek_v4
from mhc_lightning.interchange.exported_model import check_settings
from mhc_lightning.interchange.model_settings import section_records

MEMORIES = {
    "engram": {
        "_target_": "mhc_lightning.modules.Engram",
        "_partial_": True,
        "rows": 600,
        "num_heads": 2,
        "dim": 8,
        "zero_start": False,
        "placement": "device",
    },
    "over_encoding": {
        "_target_": "mhc_lightning.modules.OverEncoding",
        "_partial_": True,
        "rows": 601,
        "num_heads": 2,
        "dim": 8,
        "over_decoding_weight": 0.2,
    },
}
TOKENS = torch.randint(0, 257, (2, 19), generator=torch.Generator().manual_seed(3))
TOKENS[0, 7] = 256  # a document's end


@pytest.fixture(params=MEMORIES)
def with_memory(request, settings):
    """Settings of a small network with a memory."""
    return {**settings, "memory": MEMORIES[request.param]}


@pytest.fixture
def model(with_memory, network):
    """A network of these settings that was trained on bytes."""
    model = network(with_memory)
    bind_tokenizer(model.memory, ByteTokenizer())
    return model


def export(model, folder, settings, **options):
    export_model(model, folder, settings=settings, tokenizer=ByteTokenizer(), **options)


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 9000])
def test_a_memory_comes_back_bit_for_bit(tmp_path, with_memory, model, network, shard_bytes):
    export(model, tmp_path / "out", with_memory, shard_bytes=shard_bytes)
    back = load_exported(tmp_path / "out")
    state = model.state_dict()
    assert list(state) == list(back.state_dict())
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    assert back.memory.is_bound and back.memory.hash.classes.dtype == torch.int64
    bind_tokenizer(back.memory, ByteTokenizer())  # it is the same one
    assert torch.equal(back(TOKENS), model(TOKENS))
    for bound in (False, True):
        other = network(with_memory)
        if bound:
            bind_tokenizer(other.memory, ByteTokenizer())
        import_model(tmp_path / "out", other)
        assert torch.equal(other(TOKENS), model(TOKENS))
    record = json.loads((tmp_path / "out/config.json").read_text())
    assert record["memory"]["rows"] == with_memory["memory"]["rows"]
    assert "placement" not in record["memory"], "where rows are is the reader's choice"


def test_a_folder_without_memory_is_what_it_was(tmp_path, settings, network):
    plain = network(settings)
    none = {**settings, "memory": {"_target_": "mhc_lightning.modules.Memory", "_partial_": True}}
    for name, given in (("before", settings), ("now", none)):
        export(plain, tmp_path / name, given)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "now" / file).read_bytes()
    assert "memory" not in json.loads((tmp_path / "now/config.json").read_text())


def rows_by_hand(constants, tokens):
    """Rows of each table [L, B, S, H], by numpy and the constants of the files alone."""
    names = ("classes", "multipliers", "moduli", "pad", "document_end", "orders")
    classes, factors, moduli, pad, end, orders = (constants[f"memory.hash.{n}"] for n in names)
    stride = -(-int(moduli.max()) // 64) * 64  # rows from one head's first to the next one's
    found = np.zeros((len(moduli), *tokens.shape, moduli.shape[1]), dtype=np.int64)
    for row, text in enumerate(tokens.tolist()):
        for place in range(len(text)):
            gram, over = [classes[text[place]]], False
            for back in range(1, int(orders.max())):
                over = over or place < back or text[place - back] == end[0]
                gram.append(pad[0] if over else classes[text[place - back]])
            for table in range(len(moduli)):
                for head, order in enumerate(orders):
                    if factors.ndim == 2:
                        mixed = 0
                        for x, factor in zip(gram[:order], factors[table], strict=False):
                            mixed ^= int(x) * int(factor)
                    else:
                        mixed = sum(
                            int(x) * int(f) for x, f in zip(gram, factors[table, head], strict=True)
                        )
                    found[table, row, place, head] = mixed % moduli[table, head] + stride * head
    return found


def test_another_program_finds_the_same_rows(tmp_path, with_memory, model):
    export(model, tmp_path / "out", with_memory)
    constants = load_numpy(tmp_path / "out/model.safetensors")
    expected = rows_by_hand(constants, TOKENS.numpy())
    assert np.array_equal(model.memory.hash(TOKENS).numpy(), expected)
    assert len(np.unique(expected)) > 100
    tables = [name for name in constants if name.endswith("memory.table.weight")]
    assert len(tables) == len(expected) and constants[tables[0]].shape[0] > expected.max()
    if "memory.word_divisor" in constants:
        assert constants["memory.word_divisor"] == 1  # the embedding is not divided


def test_what_does_not_fit_is_named_before_anything_is_read(tmp_path, with_memory, model, network):
    export(model, tmp_path / "out", with_memory)
    wider = {**with_memory, "memory": {**with_memory["memory"], "num_heads": 4}}
    other = network(wider)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError, match=r"the memory of .*memory\.num_heads=2 \(not 4\)"):
        import_model(tmp_path / "out", other)
    assert all(torch.equal(tensor, before[n]) for n, tensor in other.state_dict().items())
    with pytest.raises(UserError, match=r"memory of the model to export .*num_heads=2 \(not 4\)"):
        export(model, tmp_path / "new", wider)
    assert not (tmp_path / "new").exists()
    exported = open_exported(tmp_path / "out")
    with pytest.raises(UserError, match=r"memory\.num_heads=2 \(not 4\)"):
        check_settings(exported, wider)
    free = {"placement": "host", "zero_start": True, "over_decoding_weight": 0.3}
    free = {key: value for key, value in free.items() if key in with_memory["memory"]}
    check_settings(exported, {**with_memory, "memory": {**with_memory["memory"], **free}})

    swapped = np.arange(257)
    swapped[[65, 66]] = [66, 65]
    bound = network(with_memory)
    bound.memory.bind(swapped // 2, 255)
    with pytest.raises(UserError, match="another tokenizer, whose documents end with token 256"):
        import_model(tmp_path / "out", bound)


def test_with_and_without_a_memory(tmp_path, settings, with_memory, model, network):
    export(model, tmp_path / "with", with_memory)
    export(network(settings), tmp_path / "without", settings)
    kind = "engram" if "Engram" in with_memory["memory"]["_target_"] else "over_encoding"
    with pytest.raises(UserError, match=rf"memory={kind} \(not none\)"):
        import_model(tmp_path / "with", network(settings))
    with pytest.raises(UserError, match=rf"memory=none \(not {kind}\)"):
        import_model(tmp_path / "without", model)
    exported = open_exported(tmp_path / "without")
    check_settings(exported, with_memory, new_memory=True)
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint = weights_checkpoint(exported, expected, new_memory=True)
    assert not any("memory" in name for name in checkpoint["state_dict"])
    with pytest.raises(UserError, match=r"missing: memory\."):
        weights_checkpoint(exported, expected)


def test_constants_of_another_type_are_refused(tmp_path, with_memory, model):
    export(model, tmp_path / "out", with_memory)
    file = tmp_path / "out/model.safetensors"
    record = json.loads((tmp_path / "out/config.json").read_text())
    del record["files"], record["checksum"]
    (tmp_path / "out/config.json").write_text(json.dumps(record))
    tensors = load_file(file)
    for name, dtype in (("memory.hash.classes", torch.int32), ("output.weight", torch.int64)):
        save_file({**tensors, name: tensors[name].to(dtype)}, file)
        with pytest.raises(UserError, match=rf"{name} in .* is I(32|64), not one of"):
            load_exported(tmp_path / "out")
        state = {**model.state_dict(), name: tensors[name].to(dtype)}
        with pytest.raises(UserError, match=f"no plain weight, {name}"):
            export(state, tmp_path / "new", with_memory)


def test_a_record_can_name_no_other_class(tmp_path, with_memory, model):
    export(model, tmp_path / "out", with_memory)
    file = tmp_path / "out/config.json"
    record = json.loads(file.read_text())
    del record["checksum"]
    record["memory"]["class"] = "torch.nn.Linear"
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"torch\.nn\.Linear, which is no Memory"):
        load_exported(tmp_path / "out")
    record["memory"] = {**section_records(with_memory)["memory"], "seed": 5}
    file.write_text(json.dumps(record))
    if "Engram" in record["memory"]["class"]:
        with pytest.raises(UserError, match=r"the memory of .*memory\.multipliers"):
            load_exported(tmp_path / "out")
    else:
        with pytest.raises(UserError, match="seed"):
            load_exported(tmp_path / "out")


def test_deepseek_v4s_layout_has_no_place_for_it(settings, with_memory, model, network):
    with pytest.raises(UserError, match="no place for a memory"):
        to_deepseek_v4(model)
    settings["connection"]["eps"] = 1e-6
    plain = network(settings)
    tensors, record = to_deepseek_v4(plain)
    with_memory["connection"]["eps"] = 1e-6
    taker = network(with_memory)
    from_deepseek_v4(taker, tensors, record)  # connections alone come in
    assert torch.equal(taker.blocks[1].attention_connection.phi,
                       plain.blocks[1].attention_connection.phi)  # fmt: skip
