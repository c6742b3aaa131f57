"""Tokenizers as models have them: folders of transformers, GGUF files, names on the hub."""

import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_tokenizers import gpt2_like, llama_like, write_gguf
from transformers import AutoTokenizer

from mhc_lightning.data import (
    ByteTokenizer,
    JsonTokenizer,
    PreparedData,
    TextDataModule,
    load_tokenizer,
    prepare,
    stream_documents,
)
from mhc_lightning.data.documents import ReadingOptions, Skipped
from mhc_lightning.data.model_tokenizer import difference
from mhc_lightning.errors import UserError

AutoTokenizer: Any = AutoTokenizer  # its annotations know no tokenizers of others
TEXTS = ["a fast cat", "", "the <s> </s> 1 <|endoftext|>\n\n", "ä 🎉"]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return llama_like(tmp_path / "llama")


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return gpt2_like(tmp_path / "gpt2")


def documents_of(folder: Path, tokenizer: Any, texts: list[str], **settings: Any) -> list[int]:
    """The training tokens of a prepared folder of documents."""
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = folder / "out"
    settings = {"validation_fraction": 0, "progress": False, "num_workers": 1, **settings}
    prepare(source, out, tokenizer=tokenizer, overwrite=True, **settings)
    data = PreparedData(out)
    return [int(t) for chunk in data.chunks("train") for t in data.tokens(chunk)]


def test_documents_begin_and_end_as_the_model_expects(
    llama: Path, gpt2: Path, tmp_path: Path
) -> None:
    texts = ["a cat", "the dog"]
    for folder, begins in ((llama, True), (gpt2, False)):
        theirs = AutoTokenizer.from_pretrained(folder)
        first, second = ([*theirs(text)["input_ids"], theirs.eos_token_id] for text in texts)
        assert documents_of(tmp_path, folder, texts) == first + second
        assert (first[0] == theirs.bos_token_id) == begins
        assert theirs.decode(first, skip_special_tokens=True).strip() == "a cat"


def test_the_beginning_is_a_setting(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    ids = {name: load_tokenizer(llama).encode(name).tolist() for name in ("a cat", "the dog")}
    plain = documents_of(tmp_path, llama, list(ids), begin_of_document="")
    assert plain == [*ids["a cat"], 2, *ids["the dog"], 2]
    named = documents_of(tmp_path, gpt2, ["a"], begin_of_document="<|start|>")
    assert named == [257, *load_tokenizer(gpt2).encode("a").tolist(), 256]
    twice = documents_of(tmp_path, gpt2, ["a", "a"], begin_of_document="<|endoftext|>")
    assert twice.count(256) == 2, "once between documents"
    with pytest.raises(UserError, match=r"has no token 'x1' to begin documents with; name"):
        load_tokenizer(gpt2, begin_of_document="x1")


def test_parts_of_a_long_document_do_not_begin(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("the fast dog and a cat\n" * 60_000)  # 1.4 MB
    prepare(
        tmp_path / "a.txt", tmp_path / "out", tokenizer=gpt2, begin_of_document="<|start|>",
        validation_fraction=0, progress=False, chunk_bytes=1_200_000, num_workers=1,
    )  # fmt: skip
    data = PreparedData(tmp_path / "out")
    assert len(data.chunks("train")) > 1
    tokens = np.concatenate([data.tokens(chunk) for chunk in data.chunks("train")])
    assert np.flatnonzero(tokens == 257).tolist() == [0]
    assert np.flatnonzero(tokens == 256).tolist() == [len(tokens) - 1]
    monkeypatch.setattr(stream_documents, "_BLOCK_BYTES", 100)
    read = stream_documents.text_documents(
        io.BytesIO(b"a line\n" * 60), ReadingOptions(), Skipped()
    )
    parts = list(read)
    assert len(parts) > 2
    assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)


def test_prepared_data_are_self_contained(llama: Path, tmp_path: Path) -> None:
    documents_of(tmp_path, llama, ["a cat"])
    before = load_tokenizer(llama)
    for file in llama.iterdir():
        file.unlink()
    data = PreparedData(tmp_path / "out")
    assert data.tokenizer.record() == before.record()
    assert data.tokenizer.beginning == [1] and data.tokenizer.end_of_document == 2
    assert list(data.documents("train")) == [b"a cat"]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("a cat")["input_ids"] == [1, *before.encode("a cat")]
    assert theirs.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a</s>"
    (tmp_path / "out/chat_template.jinja").write_text("{{ 1 }}")
    with pytest.raises(UserError, match=r"chat_template\.jinja is damaged \(checksum\)"):
        PreparedData(tmp_path / "out")


def test_earlier_prepared_data_go_on_without_a_beginning(llama: Path, tmp_path: Path) -> None:
    documents_of(tmp_path, llama, ["a cat"], begin_of_document="")
    data = PreparedData(tmp_path / "out")
    assert "begin_of_document" not in data.record.tokenizer, "as earlier versions wrote it"
    assert data.tokenizer.beginning == []


def test_a_gguf_file_has_the_tokenizer_of_its_model(gpt2: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", gpt2)
    ours, folder = load_tokenizer(file), load_tokenizer(gpt2)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert ours.name == "model" and ours.end_of_document == theirs.eos_token_id == 256
    for text in TEXTS:
        assert ours.encode(text).tolist() == folder.encode(text).tolist()
    documents_of(tmp_path, file, ["a cat"])
    carried = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert carried.chat_template == theirs.chat_template == "{{ messages[0].content }}"
    with pytest.raises(UserError, match=r"tokenizer=\S+none\.gguf is not there; give a GGUF"):
        load_tokenizer(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(UserError, match=r"bad\.gguf cannot be read by transformers \("):
        load_tokenizer(tmp_path / "bad.gguf")


def test_a_folder_without_a_tokenizer_json_is_read_by_transformers(
    gpt2: Path, tmp_path: Path
) -> None:
    model = json.loads((gpt2 / "tokenizer.json").read_text())["model"]
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": 256}))
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    (slow / "merges.txt").write_text("#version: 0.2\n" + merges)
    (slow / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert load_tokenizer(slow).encode("a fast cat").tolist() == (
        load_tokenizer(gpt2).encode("a fast cat").tolist()
    )
    with pytest.raises(UserError, match=r"tokenizer file \S+ does not exist; give a tokenizer\.js"):
        load_tokenizer(tmp_path)


def test_a_hub_name_offline_is_one_line_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_tokenizer("nobody-at-all/no-model")
    assert time.monotonic() - began < 10
    message = str(caught.value)
    assert "\n" not in message and message.startswith(
        "tokenizer=nobody-at-all/no-model is not here"
    )

    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Got: ConnectError.\nPlease check your connection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"cannot be reached \(.*hf download a/b\) and give the f"):
        load_tokenizer("a/b")
    fetched = gpt2_like(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(fetched))
    assert load_tokenizer("a/b").fingerprint == JsonTokenizer(fetched).fingerprint


def renamed(source: Path, folder: Path, old: str, new: str) -> Path:
    """A copy of a tokenizer's folder with other words in its file."""
    shutil.copytree(source, folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace(old, new))
    return folder


def test_tokenizers_are_told_apart_by_content(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    one = load_tokenizer(gpt2)
    same = load_tokenizer(renamed(gpt2, tmp_path / "same", '"1.0"', '"1.0" '))
    assert one.fingerprint != same.fingerprint and not difference(one, same)
    other = load_tokenizer(renamed(gpt2, tmp_path / "other", "<|start|>", "<|user|>"))
    assert difference(one, other) == "257 is '<|start|>' there and '<|user|>' for the model"
    assert difference(ByteTokenizer(), load_tokenizer(llama)).startswith("0 is '<0x00>' there and")
    more = load_tokenizer(llama, end_of_document="<unk>")
    assert not difference(load_tokenizer(llama), more), "what ends documents is another matter"
    content = json.loads((gpt2 / "tokenizer.json").read_text())
    token = {**content["added_tokens"][0], "id": one.vocab_size, "content": "<|more|>"}
    content["added_tokens"].append(token)
    (tmp_path / "same/tokenizer.json").write_text(json.dumps(content))
    larger = load_tokenizer(tmp_path / "same")
    assert not difference(one, larger)
    assert (
        difference(larger, one)
        == f"{one.vocab_size} is '<|more|>' there and 'nothing' for the model"
    )


def test_bytes_are_those_of_a_model_of_ours(tmp_path: Path) -> None:
    from mhc_lightning.huggingface.tokenizer_folder import write_tokenizer

    write_tokenizer(ByteTokenizer(), tmp_path)
    assert not difference(ByteTokenizer(), load_tokenizer(tmp_path))


def data_for(path: Path, vocab_size: int, pretrained: Path) -> TextDataModule:
    data = TextDataModule(str(path), batch_size=2, micro_batch_size=2, sequence_length=8)
    data.validate_against(vocab_size, str(pretrained))
    return data


def test_data_of_another_tokenizer_are_refused(
    llama: Path, gpt2: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    texts = ["the cat and the bird"] * 9
    documents_of(tmp_path, gpt2, texts, end_of_document="<|start|>")
    data_for(tmp_path / "out", 300, gpt2)
    assert not recwarn.list
    with pytest.raises(UserError, match=r"than that of \S+/llama: 0 is '!' there and .*prepare th"):
        data_for(tmp_path / "out", 400, llama)
    with pytest.raises(UserError, match=r"has 278 ids but \S+gpt2 has 277; tokenize the text with"):
        data_for(tmp_path / "out", 277, gpt2)
    documents_of(tmp_path, llama, texts, begin_of_document="")
    with pytest.warns(
        UserWarning, match=r"begin with no token of their own, and \S+ expects '<s>'"
    ):
        data_for(tmp_path / "out", 400, llama)
    spaces = '"add_prefix_space": false', '"add_prefix_space": true'
    cut = renamed(gpt2, tmp_path / "cut", *spaces)
    documents_of(tmp_path, cut, texts)
    with pytest.warns(UserWarning, match="but cuts texts into them in another way"):
        data_for(tmp_path / "out", 300, gpt2)
    (tmp_path / "bare").mkdir()
    with pytest.warns(UserWarning, match="there is no tokenizer beside"):
        data_for(tmp_path / "out", 300, tmp_path / "bare")


def test_token_files_are_taken_for_the_models(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    tokens = (np.arange(4000) % 278).astype(np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    data = data_for(tmp_path / "train.bin", 300, gpt2)
    assert data.tokenizer is not None and data.end_of_document == 256
    with pytest.raises(UserError, match=r"has 278 ids but \S+gpt2 has 277; tokenize the text"):
        data_for(tmp_path / "train.bin", 277, gpt2)
    tokens[7] = 300
    tokens.tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"has the id 300, and the tokenizer 'gpt2' has 278 ids"):
        data_for(tmp_path / "train.bin", 400, gpt2)
    named = TextDataModule(
        str(tmp_path / "train.bin"), batch_size=2, micro_batch_size=2, sequence_length=8,
        tokenizer=str(llama),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"were made with another tokenizer than that of \S+gpt2"):
        named.validate_against(400, str(gpt2))


def test_a_stream_keeps_the_space_behind_what_it_follows(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    whole = [int(token) for token in tokenizer.encode("the cat and the bird")]
    for cut in range(len(whole)):
        stream = tokenizer.stream(whole[:cut])
        text = "".join(map(stream.push, whole[cut:])) + stream.flush()
        assert tokenizer.decode(whole[:cut]) + text == "the cat and the bird"
