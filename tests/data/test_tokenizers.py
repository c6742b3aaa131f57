"""Tokenizers give text back, and no document forges an end."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from mhc_lightning.data import ByteTokenizer, JsonTokenizer, load_tokenizer, prepare
from mhc_lightning.data.tokenizers import Tokenizer, tokenizer_from_record
from mhc_lightning.errors import UserError


def streamed(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    stream = tokenizer.stream()
    return "".join(stream.push(int(token)) for token in ids) + stream.flush()


@settings(max_examples=20)
@given(st.binary())
def test_bytes_come_back_whatever_they_are(data: bytes) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(data)
    assert ids.tolist() == list(data)
    assert ids.dtype == np.uint16
    assert tokenizer.decode_bytes(ids) == data
    assert streamed(tokenizer, ids) == data.decode(errors="replace")


def test_byte_tokenizer_gives_nothing_for_ids_that_are_no_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.decode([104, 256, 105, 300]) == "hi"
    stream = tokenizer.stream()
    assert [stream.push(token) for token in (104, 256, 105)] == ["h", "", "i"]


def test_byte_stream_waits_for_whole_characters() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.push(byte) for byte in "é!".encode()] == ["", "é", "!"]
    stream.push(0xE2)
    assert stream.flush() == "\ufffd"


@settings(max_examples=20)
@given(text=st.text())
def test_json_tokenizer_gives_text_back(json_tokenizer: JsonTokenizer, text: str) -> None:
    ids = json_tokenizer.encode(text)
    assert json_tokenizer.decode(ids) == text
    assert streamed(json_tokenizer, ids) == text
    assert json_tokenizer.end_of_document not in ids


def test_json_stream_gives_text_as_it_comes(json_tokenizer: JsonTokenizer) -> None:
    stream = json_tokenizer.stream()
    parts = [stream.push(int(token)) for token in json_tokenizer.encode("the cat 🎉!")]
    assert "".join(parts) == "the cat 🎉!"
    assert "🎉" in parts and "!" in parts
    assert not any("\ufffd" in part for part in parts)


def test_json_stream_does_not_wait_for_ever(
    json_tokenizer: JsonTokenizer,
) -> None:
    first_byte = json_tokenizer.encode("é")[:1]
    assert streamed(json_tokenizer, np.repeat(first_byte, 9)).count("\ufffd") == 9


def test_spelled_special_token_is_ordinary_text(json_tokenizer: JsonTokenizer) -> None:
    ids = json_tokenizer.encode("a<|endoftext|>b")
    assert json_tokenizer.end_of_document not in ids
    assert json_tokenizer.decode(ids) == "a<|endoftext|>b"


def test_no_text_is_taken_for_any_special_token(tokenizer_file: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_special_tokens(["<|user|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    chosen = JsonTokenizer(tmp_path)
    assert tokenizer.token_to_id("<|user|>") not in chosen.encode("a<|user|>b")
    assert chosen.decode(chosen.encode("a<|user|>b")) == "a<|user|>b"


def test_end_of_document_is_found_or_named(tokenizer_file: Path, tmp_path: Path) -> None:
    renamed = json.loads(tokenizer_file.read_text().replace("<|endoftext|>", "<the end>"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(renamed))
    with pytest.raises(UserError, match="end_of_document"):
        JsonTokenizer(path)
    named = JsonTokenizer(path, "<the end>")
    assert named.decode([named.end_of_document]) == ""
    with pytest.raises(UserError, match="'nothing'"):
        JsonTokenizer(path, "nothing")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<the end>"}}')
    assert JsonTokenizer(tmp_path).fingerprint == named.fingerprint


def test_fingerprint_tells_tokenizers_apart(tokenizer_file: Path) -> None:
    one = JsonTokenizer(tokenizer_file)
    assert one.fingerprint != JsonTokenizer(tokenizer_file, "a").fingerprint
    assert one.fingerprint != ByteTokenizer().fingerprint
    assert pickle.loads(pickle.dumps(one)).fingerprint == one.fingerprint


def test_record_builds_the_tokenizer_again(tokenizer_file: Path, tmp_path: Path) -> None:
    assert isinstance(tokenizer_from_record(ByteTokenizer().record(), tmp_path), ByteTokenizer)
    original = JsonTokenizer(tokenizer_file)
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    record = json.loads(json.dumps(original.record()))
    assert tokenizer_from_record(record, tmp_path).fingerprint == original.fingerprint
    changed = tokenizer_file.read_text() + "\n"
    (tmp_path / "tokenizer.json").write_text(changed)
    with pytest.raises(UserError, match="not the tokenizer"):
        tokenizer_from_record(record, tmp_path)


def test_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent/tokenizer.*does not exist"):
        load_tokenizer(tmp_path / "absent/tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def write_tokenizer(folder: Path, model: Any, added: dict[str, bool] | None = None) -> Path:
    """A `tokenizer.json` of a model; `added` tokens are special or not."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    for token, special in (added or {}).items():
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def character_models() -> dict[str, Any]:
    characters = ["<unk>", "</s>", *"▁abs</>"]
    scores = [(token, 0.0 if len(token) > 1 else -5.0) for token in characters]
    ids = {token: number for number, token in enumerate(characters)}
    return {
        "unigram": models.Unigram(scores, 0),  # finds </s> as a word of its own
        "bpe": models.BPE(ids, [], unk_token="<unk>"),
        "bpe that takes whole words": models.BPE(ids, [], unk_token="<unk>", ignore_merges=True),
    }


@pytest.mark.parametrize("name", list(character_models()))
@pytest.mark.parametrize("added", [{"</s>": True}, {"</s>": False}, {}], ids=str)
def test_no_document_forges_an_end(tmp_path: Path, name: str, added: dict[str, bool]) -> None:
    tokenizer = JsonTokenizer(write_tokenizer(tmp_path, character_models()[name], added))
    assert tokenizer.end_of_document_token == "</s>"
    texts = ["a</s>b", "</s>", "a </s></s> b", "</s</s>/s>", "ab"]
    encoded = tokenizer.encode_documents([text.encode() for text in texts])
    for text, ids in zip(texts, encoded, strict=True):
        assert tokenizer.end_of_document not in ids
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_an_end_that_ordinary_text_becomes_is_refused(tmp_path: Path) -> None:
    model = models.BPE({"</s>": 0, "a": 1}, [], unk_token="</s>")
    tokenizer = JsonTokenizer(write_tokenizer(tmp_path, model))
    with pytest.raises(UserError, match="encodes ordinary text as '</s>', which ends documents"):
        tokenizer.encode("ab")


def test_unknown_text_is_counted_warned_of_or_refused(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a?b!")
    path = write_tokenizer(tmp_path, models.BPE({"a": 0, "b": 1, "?": 2, "</s>": 3}, []))
    with pytest.warns(UserWarning, match="leaves out characters that it does not know"):
        JsonTokenizer(path)
    write_tokenizer(tmp_path, models.WordLevel({"a": 0, "</s>": 1}, "<unk>"))
    with pytest.raises(UserError, match=r"cannot encode a text: .*UNK"):
        JsonTokenizer(path).encode("b")
    for name, model in character_models().items():
        write_tokenizer(tmp_path, model)
        summary = prepare(
            tmp_path / "in.txt",
            tmp_path / name,
            tokenizer=path,
            validation_fraction=0.0,
            progress=False,
        )
        assert summary.total.unknown == 2
        assert "2 tokens of text that the tokenizer does not know" in str(summary)


def test_ids_that_the_library_changes_are_named(tokenizer_file: Path, tmp_path: Path) -> None:
    content = json.loads(tokenizer_file.read_text())
    content["added_tokens"][0]["id"] += 50_000
    token = content["added_tokens"][0]["content"]
    del content["model"]["vocab"][token]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=f"gaps in its ids, .*'{re.escape(token)}' is"):
        JsonTokenizer(tmp_path)


def test_dropout_truncation_and_padding_are_off(tokenizer_file: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    tokenizer.model.dropout = 0.5
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "the cat and the other cat " * 20
    expected = JsonTokenizer(tokenizer_file).encode(text).tolist()
    assert JsonTokenizer(tmp_path).encode(text).tolist() == expected


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token": ["a"]}', "\xff"])
def test_a_broken_configuration_is_named(
    tokenizer_file: Path, tmp_path: Path, content: str
) -> None:
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be understood"):
        JsonTokenizer(tmp_path)
