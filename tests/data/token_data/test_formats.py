"""Each format, written by hand and by its own library, gives the stream of a naive reader."""

from pathlib import Path

import numpy as np
import pytest
import token_files as write

from mhc_lightning.data.sources import Source, open_sources
from mhc_lightning.data.token_data.token_data import TokenData
from mhc_lightning.errors import UserError


def opened(path: Path | str, validation_fraction: float = 0.0) -> TokenData:
    (data,), _ = open_sources([Source(str(path))], 16, validation_fraction=validation_fraction)
    assert isinstance(data, TokenData)
    return data


def stream(data: TokenData, split: str = "train") -> list[int]:
    tokens: list[int] = []
    for span in data.chunks(split):
        reader = data.open_chunk(span)
        tokens += reader.read(0, span.tokens).tolist()
        assert reader.read(3, 5).tolist() == tokens[len(tokens) - span.tokens :][3:8]
        assert reader.read(span.tokens - 2, 5).tolist() == tokens[-2:]
        reader.close()
    return tokens


DOCUMENTS = write.documents()
TOKENS = np.concatenate(DOCUMENTS)
OTHERS = write.documents(seed=1)


def test_nanogpt(tmp_path: Path) -> None:
    write.write_raw(tmp_path / "train.bin", TOKENS)
    write.write_raw(tmp_path / "val.bin", OTHERS[0])
    (tmp_path / "meta.pkl").write_bytes(b"never opened")
    data = opened(tmp_path, validation_fraction=0.5)
    assert stream(data) == TOKENS.tolist() and stream(data, "validation") == OTHERS[0].tolist()
    assert data.kind == "nanoGPT .bin" and data.end_of_document is None
    assert "not read: meta.pkl" in data.description and "uint16" in data.description
    assert stream(opened(tmp_path / "val.bin")) == OTHERS[0].tolist()


def test_tokens_of_32_bits_without_a_header(tmp_path: Path) -> None:
    wide = TOKENS + 70_000
    assert stream(opened(write.write_raw(tmp_path / "wide.bin", wide, "<u4"))) == wide.tolist()
    low = write.write_raw(tmp_path / "low.bin", TOKENS[: len(TOKENS) // 2 * 2], "<u4")
    assert stream(opened(low)) == TOKENS[: len(TOKENS) // 2 * 2].tolist()
    characters = write.write_raw(tmp_path / "characters.bin", TOKENS % 65)
    assert stream(opened(characters)) == (TOKENS % 65).tolist()


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")]
)
def test_llm_c(tmp_path: Path, magic: int, version: int, dtype: str) -> None:
    shards = [TOKENS, np.concatenate(OTHERS)]
    for number, tokens in enumerate(shards):
        name = f"fineweb_train_{number:06d}.bin"
        write.write_llm_c(tmp_path / name, tokens, magic, version, dtype)
    write.write_llm_c(tmp_path / "fineweb_val_000000.bin", OTHERS[1], magic, version, dtype)
    data = opened(tmp_path)
    assert stream(data) == np.concatenate(shards).tolist()
    assert stream(data, "validation") == OTHERS[1].tolist()
    assert data.kind == "llm.c .bin"


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "i8"])
@pytest.mark.parametrize("modes", [False, True])
def test_megatron(tmp_path: Path, dtype: str, modes: bool) -> None:
    """Documents of one sequence each, and of several."""
    texts = [text % 200 for text in DOCUMENTS]
    prefix = write.write_megatron(tmp_path / "my_text_document", texts, dtype=dtype, modes=modes)
    for path in (prefix, f"{prefix}.bin", f"{prefix}.idx", tmp_path):
        data = opened(path)
        assert stream(data) == np.concatenate(texts).tolist()
    assert data.kind == "Megatron-LM .bin/.idx" and data.end_of_document == 0
    assert "40 documents, which end with 0" in data.description
    assert ("modes" in data.description) == modes
    # A border after every fourth sequence only, and empty documents.
    halves = [half for text in texts for half in np.split(text, [len(text) // 2])]
    borders = [0, *range(0, 81, 4), 80]
    write.write_megatron(tmp_path / "halves/a", halves, borders, dtype)
    data = opened(tmp_path / "halves")
    assert stream(data) == np.concatenate(texts).tolist() and data.end_of_document == 0
    assert "22 documents" in data.description
    cut = write.write_megatron(tmp_path / "cut/a", halves, range(80 + 1), dtype)
    assert opened(cut).end_of_document is None
    alone = write.write_megatron(tmp_path / "alone/a", halves, [], dtype)
    assert stream(opened(alone)) == np.concatenate(texts).tolist()


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("index", [True, False])
def test_datatrove(tmp_path: Path, width: int, index: bool) -> None:
    write.write_datatrove(tmp_path / "00000_shuffled.ds", DOCUMENTS, width, index)
    write.write_datatrove(tmp_path / "rank/00001_shuffled.ds", OTHERS, width, index)
    data = opened(tmp_path)
    assert stream(data) == np.concatenate([*DOCUMENTS, *OTHERS]).tolist()
    assert data.kind == "datatrove .ds" and data.end_of_document == (0 if index else None)


def as_in_batches(tokens: np.ndarray, predicted: np.ndarray) -> list[int]:
    return [int(t) if p else -101 - int(t) for t, p in zip(tokens, predicted, strict=True)]


def test_a_loss_mask_of_datatrove(tmp_path: Path) -> None:
    write.write_datatrove(tmp_path / "a.ds", DOCUMENTS)
    predicted = np.random.default_rng(3).random(len(TOKENS)) < 0.5
    (tmp_path / "a.ds.loss").write_bytes(predicted.tobytes())
    data = opened(tmp_path)
    assert stream(data) == as_in_batches(TOKENS, predicted)
    assert "1 of 1 files say which tokens are not predicted" in data.description
    assert data.end_of_document == 0 and data.largest_id == TOKENS.max()
    content = data.content
    (tmp_path / "a.ds.loss").write_bytes((~predicted).tobytes())
    assert opened(tmp_path).content != content
    (tmp_path / "a.ds.loss").write_bytes(bytes(3))
    with pytest.raises(UserError, match=r"a\.ds\.loss has 3 bytes for"):
        opened(tmp_path)


@pytest.mark.parametrize("column", ["labels", "completion_mask", "assistant_masks"])
def test_columns_of_datasets_that_say_what_is_predicted(tmp_path: Path, column: str) -> None:
    import datasets

    predicted = [np.arange(len(text)) >= len(text) // 3 for text in DOCUMENTS]
    said = [
        np.where(mask, text, -100) if column == "labels" else mask.astype(int)
        for text, mask in zip(DOCUMENTS, predicted, strict=True)
    ]
    rows = {"input_ids": DOCUMENTS, column: said, "attention_mask": said}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "a", num_shards=2)
    data = opened(tmp_path / "a")
    assert stream(data) == as_in_batches(TOKENS, np.concatenate(predicted))
    assert "columns not used: attention_mask" in data.description
    rows[column] = [*said[1:], said[0]]
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "b")
    with pytest.raises(UserError, match=f"rows whose {column} are not as many as their input_ids"):
        opened(tmp_path / "b")


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8"])
def test_litdata_by_hand(tmp_path: Path, dtype: str) -> None:
    write.write_litdata(tmp_path / "train", DOCUMENTS[:3], dtype)
    write.write_litdata(tmp_path / "val", OTHERS[:2], dtype)
    data = opened(tmp_path)
    assert stream(data) == np.concatenate(DOCUMENTS[:3]).tolist()
    assert stream(data, "validation") == np.concatenate(OTHERS[:2]).tolist()
    assert data.kind == "litdata chunks"
    assert stream(opened(tmp_path / "val")) == np.concatenate(OTHERS[:2]).tolist()


def test_litdata_of_the_library(tmp_path: Path) -> None:
    import torch
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    for name, convert in (
        ("tensors", lambda text: torch.tensor(text, dtype=torch.int32)),
        ("long", torch.tensor),
        ("arrays", lambda text: text.astype(np.uint16)),
    ):
        folder = tmp_path / name
        writer = BinaryWriter(str(folder), chunk_bytes="4KB", item_loader=TokensLoader())
        for number, text in enumerate(DOCUMENTS):
            writer[number] = convert(text)
        writer.done()
        writer.merge()
        data = opened(folder)
        assert len(data.chunks("train")) > 1
        assert stream(data) == TOKENS.tolist()


@pytest.mark.parametrize("kind", ["int32", "int64", "uint16", "large", "fixed"])
def test_datasets(tmp_path: Path, kind: str) -> None:
    import datasets

    if kind == "fixed":
        rows = [
            row.tolist() for row in np.split(TOKENS[: len(TOKENS) // 32 * 32], len(TOKENS) // 32)
        ]
        column = datasets.Sequence(datasets.Value("int32"), length=32)
    else:
        rows = [text.tolist() for text in DOCUMENTS]
        item = datasets.Value("int32" if kind == "large" else kind)
        column = datasets.LargeList(item) if kind == "large" else datasets.Sequence(item)
    features = datasets.Features({"input_ids": column, "n": datasets.Value("int64")})
    made = datasets.Dataset.from_dict(
        {"input_ids": rows, "n": list(range(len(rows)))}, features=features
    )
    made.save_to_disk(tmp_path / "one", num_shards=2)
    data = opened(tmp_path / "one")
    assert stream(data) == [token for row in rows for token in row]
    assert data.kind == "datasets folder"
    assert data.end_of_document == (None if kind == "fixed" else 0)
    shuffled = made.shuffle(seed=1).select(range(10))  # rows by an index, flattened when saved
    both = datasets.DatasetDict({"train": made, "validation": shuffled, "test": shuffled})
    both.save_to_disk(tmp_path / "both")
    data = opened(tmp_path / "both")
    assert stream(data) == [token for row in rows for token in row]
    assert stream(data, "validation") == [t for row in shuffled["input_ids"] for t in row]
    assert "not read: test/" in data.description


def test_a_datasets_folder_of_many_record_batches(tmp_path: Path) -> None:
    import json

    import pyarrow as pa

    with pa.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as sink:
        schema = pa.schema({"input_ids": pa.list_(pa.int32()), "x": pa.string()})
        with pa.ipc.new_stream(sink, schema) as writer:
            for start in range(0, 40, 3):
                texts = [text.tolist() for text in DOCUMENTS[start : start + 3]]
                names = ["é" * len(text) for text in texts]
                writer.write_batch(pa.record_batch([texts, names], schema=schema))
            writer.write_batch(pa.record_batch([[[], []], ["", ""]], schema=schema))
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    data = opened(tmp_path)
    assert stream(data) == TOKENS.tolist()
    (span,) = data.chunks("train")
    reader = data.open_chunk(span)
    for start in range(0, len(TOKENS), 37):
        assert reader.read(start, 400).tolist() == TOKENS[start : start + 400].tolist()
