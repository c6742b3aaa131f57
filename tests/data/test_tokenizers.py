import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhc_lightning.data import ByteTokenizer, JsonTokenizer, load_tokenizer
from mhc_lightning.data.tokenizers import Tokenizer, tokenizer_from_record
from mhc_lightning.errors import UserError


def streamed(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    stream = tokenizer.stream()
    return "".join(stream.push(int(token)) for token in ids) + stream.flush()


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
