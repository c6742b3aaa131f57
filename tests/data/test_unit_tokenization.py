"""Long documents are encoded in parts, with the tokens of the whole and in little memory."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhc_lightning.data import (
    JsonTokenizer,
    PreparedData,
    prepare,
    stream_documents,
    text_parts,
    unit_tokenization,
)

LINES = "".join(
    f"The cat {number} and the dog's bird;" + " " * (number % 3) + "\n" * (1 + number % 2)
    for number in range(1500)
)
SETTINGS: dict[str, Any] = {"num_workers": 1, "validation_fraction": 0.0, "progress": False}


@pytest.fixture
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts of a kilobyte; yields the lengths of the texts that are encoded together."""
    given: list[int] = []
    encode: Callable[..., Any] = JsonTokenizer._encode

    def spy(self: JsonTokenizer, texts: list[str]) -> list[np.ndarray]:
        given.append(sum(map(len, texts)))
        return list(encode(self, texts))

    monkeypatch.setattr(JsonTokenizer, "_encode", spy)
    for module, name in (
        (unit_tokenization, "_PART_BYTES"),
        (unit_tokenization, "_BATCH_BYTES"),
        (stream_documents, "_BLOCK_BYTES"),
        (stream_documents, "_TAIL_BYTES"),
    ):
        monkeypatch.setattr(module, name, 1000)
    return given


def tokens_of(folder: Path) -> list[int]:
    prepared = PreparedData(folder)
    chunks = [prepared.tokens(chunk) for chunk in prepared.chunks("train")]
    return np.concatenate(chunks).tolist()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "utf16.txt"])
def test_tokens_are_those_of_the_whole(
    tmp_path: Path, tokenizer_file: Path, in_small_parts: list[int], name: str
) -> None:
    data = {
        "a.txt": LINES.encode(),
        "a.txt.gz": gzip.compress(LINES.encode()),
        "a.jsonl": json.dumps({"text": LINES}).encode(),
        "utf16.txt": LINES.encode("utf-16"),
    }[name]
    (tmp_path / name).write_bytes(data)
    tokenizer = JsonTokenizer(tokenizer_file)
    whole = [*tokenizer.encode(LINES).tolist(), tokenizer.end_of_document]
    in_small_parts.clear()
    summary = prepare(
        tmp_path / name, tmp_path / "out", tokenizer=tokenizer_file, chunk_bytes=5000, **SETTINGS
    )
    assert tokens_of(tmp_path / "out") == whole
    assert summary.total.documents == 1 and summary.total.unproven_cuts == 0
    assert len(in_small_parts) > 10 and max(in_small_parts) < 4000


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_without_proven_cuts_is_cut_all_the_same_and_counted(
    tmp_path: Path,
    tokenizer_file: Path,
    in_small_parts: list[int],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    text = "0123456789" * 3000  # one token of the rules, where no cut is allowed
    (tmp_path / name).write_bytes(
        gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    )
    monkeypatch.setattr(stream_documents, "_LONGEST_UNCUT", 4000)
    monkeypatch.setattr(text_parts, "_LONGEST_UNCUT", 4000)
    monkeypatch.setattr(text_parts, "_LONGEST_LINE_SOUGHT", 1000)
    summary = prepare(
        tmp_path / name, tmp_path / "out", tokenizer=tokenizer_file, chunk_bytes=5000, **SETTINGS
    )
    assert 2 <= summary.total.unproven_cuts <= 10
    assert "cuts in long documents that may change tokens there" in str(summary)
    prepared = PreparedData(tmp_path / "out")
    assert b"".join(prepared.documents("train")) == text.encode()


@pytest.mark.slow
def test_a_document_of_30_mb_needs_little_memory(tmp_path: Path, tokenizer_file: Path) -> None:
    """Peak of a process, above what it is after a small document; the whole took 60 times this."""
    script = f"""
import json, resource, sys
from pathlib import Path
from mhc_lightning.data import prepare
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def run(size):
    path = Path({str(tmp_path)!r}, f"{{size}}.jsonl")
    path.write_text(json.dumps({{"text": "the cat and the dog\\n" * (size // 20)}}))
    prepare(path, path.with_suffix(".out"), tokenizer={str(tokenizer_file)!r}, num_workers=1,
            validation_fraction=0.0, chunk_bytes=1 << 22, progress=False)
run(2_000_000)
before = peak()
run(30_000_000)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 6 * 30_000_000, done.stdout
