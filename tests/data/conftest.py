"""Small inputs and prepared folders that the tests of this room share."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mhc_lightning.data import JsonTokenizer, PreparedData, prepare


def _write_texts(folder: Path, count: int, seed: int = 0, length: int = 3000) -> Path:
    """Files of random lines, each different."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        words = [f"{generator.randrange(10**6):x}" for _ in range(length // 6)]
        lines = [" ".join(words[start : start + 9]) for start in range(0, len(words), 9)]
        (folder / f"text {number:03d}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def write_texts() -> Callable[..., Path]:
    return _write_texts


@pytest.fixture(scope="session")
def prepared_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of several chunks, byte level, with a validation split."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = _write_texts(folder / "texts", 40)
    output = folder / "data = é"
    prepare(texts, output, chunk_bytes=16_000, validation_fraction=0.3, progress=False)
    return output


@pytest.fixture(scope="session")
def prepared(prepared_path: Path) -> PreparedData:
    return PreparedData(prepared_path)


@pytest.fixture
def earlier_record(prepared: PreparedData) -> dict[str, Any]:
    """The content of a `prepared.json` as versions without checksums of it wrote it."""
    record: dict[str, Any] = json.loads(prepared.record.to_json())
    for key in ("checksum", "files", "forms"):
        del record[key]
    for counts in record["counts"].values():
        del counts["with_nul"]
    for chunk in [*record["chunks"]["train"], *record["chunks"]["validation"]]:
        del chunk["xxh3"]
    return record


@pytest.fixture(scope="session")
def other_prepared_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text, prepared likewise."""
    folder = tmp_path_factory.mktemp("other")
    texts = _write_texts(folder / "texts", 30, seed=1)
    prepare(texts, folder / "out", chunk_bytes=16_000, validation_fraction=0.3, progress=False)
    return folder / "out"


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of a few hundred tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the dog and the bird"] * 20, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def json_tokenizer(tokenizer_file: Path) -> JsonTokenizer:
    return JsonTokenizer(tokenizer_file)
