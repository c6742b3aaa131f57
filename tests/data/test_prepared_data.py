"""A prepared folder is checked when it is opened."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhc_lightning.data import PreparedData, prepare
from mhc_lightning.errors import UserError


@pytest.fixture
def copy(prepared_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared_path, tmp_path / "copy"))


def test_missing_folder_says_to_prepare_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent does not exist; make it with `prepare input=… "):
        PreparedData(tmp_path / "absent")
    with pytest.raises(UserError, match="is not a prepared folder; make it with"):
        PreparedData(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 99}', '{"format": 1, "identity": "x"}'])
def test_broken_record_is_named(copy: Path, content: str) -> None:
    (copy / "prepared.json").write_text(content)
    with pytest.raises(UserError, match=r"copy/prepared\.json cannot be understood"):
        PreparedData(copy)


def test_missing_and_truncated_chunks_are_named_at_the_start(copy: Path) -> None:
    chunk = copy / PreparedData(copy).chunks("train")[2].name
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-1])
    with pytest.raises(
        UserError, match=rf"{chunk.name} has {len(data) - 1} bytes, not {len(data)}"
    ):
        PreparedData(copy)
    chunk.unlink()
    with pytest.raises(UserError, match=rf"{chunk.name} is missing; copy it again, or delete"):
        PreparedData(copy)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_changed_byte_is_found_where_a_chunk_is_opened(copy: Path, split: str) -> None:
    chunk = PreparedData(copy).chunks(split)[0]
    flip(copy / chunk.name, -7)
    damaged = PreparedData(copy)
    with pytest.raises(UserError, match=rf"{chunk.name} is damaged .* copy it again, or delete"):
        damaged.tokens(chunk)
    with pytest.raises(UserError, match=rf"{chunk.name} is damaged"):
        list(damaged.documents(split))


@pytest.mark.parametrize("name", ["train/index.json", "validation/index.json"])
def test_damaged_indices_are_named_at_the_start(copy: Path, name: str) -> None:
    flip(copy / name, 40)
    with pytest.raises(UserError, match=rf"copy/{name} is damaged \(checksum\); copy it again"):
        PreparedData(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=rf"copy/{name} cannot be read: No such file"):
        PreparedData(copy)
    (copy / name).mkdir()
    with pytest.raises(UserError, match=rf"copy/{name} cannot be read: "):
        PreparedData(copy)


def test_a_damaged_tokenizer_is_named_at_the_start(tokenizer_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\n" * 100)
    prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer_file, progress=False)
    assert PreparedData(tmp_path / "out").tokenizer.vocab_size > 0
    flip(tmp_path / "out/tokenizer.json", 500)
    with pytest.raises(UserError, match=r"out/tokenizer\.json is damaged \(checksum\); copy it"):
        PreparedData(tmp_path / "out")


def test_chunks_that_are_no_readable_files_are_named_at_the_start(copy: Path) -> None:
    chunk = copy / PreparedData(copy).chunks("train")[2].name
    chunk.unlink()
    chunk.symlink_to("absent")
    with pytest.raises(UserError, match=rf"{chunk.name} is missing"):
        PreparedData(copy)
    chunk.unlink()
    chunk.symlink_to(chunk.name)
    with pytest.raises(UserError, match=rf"{chunk.name} cannot be read: Too many levels"):
        PreparedData(copy)
    chunk.unlink()
    chunk.mkdir()
    with pytest.raises(UserError, match=rf"{chunk.name} is no file"):
        PreparedData(copy)


def test_folders_of_earlier_versions_are_checked_as_far_as_they_can_be(
    copy: Path, earlier_record: dict[str, Any], prepared: PreparedData
) -> None:
    (copy / "prepared.json").write_text(json.dumps(earlier_record))
    earlier = PreparedData(copy)
    assert "was prepared by an earlier version" in earlier.unchecked and not prepared.unchecked
    first, second = earlier.chunks("train")[:2]
    assert np.array_equal(earlier.tokens(first), prepared.tokens(prepared.chunks("train")[0]))
    flip(copy / second.name, 1000)
    with pytest.raises(UserError, match=rf"{second.name} is damaged"):
        earlier.tokens(second)


def test_verify_finds_a_changed_byte(copy: Path) -> None:
    prepared = PreparedData(copy)
    prepared.verify()
    chunk = copy / prepared.chunks("validation")[0].name
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(UserError, match=rf"{chunk.name} is damaged"):
        PreparedData(copy).verify()


def test_bytes_per_token_turns_nats_into_bits_per_byte(
    prepared: PreparedData, tmp_path: Path
) -> None:
    documents = list(prepared.documents("validation"))
    size = sum(map(len, documents))
    assert prepared.bytes_per_token() == size / (size + len(documents))
    (tmp_path / "a.txt").write_text("text\n" * 50)
    prepare(tmp_path / "a.txt", tmp_path / "out", validation_fraction=0.0, progress=False)
    empty = PreparedData(tmp_path / "out")
    assert math.isnan(empty.bytes_per_token())
    assert list(empty.documents("validation")) == []
