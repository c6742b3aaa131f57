import json
import math
import shutil
from pathlib import Path

import pytest

from mhc_lightning.data import PreparedData
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


def test_verify_finds_a_changed_byte(copy: Path) -> None:
    prepared = PreparedData(copy)
    prepared.verify()
    chunk = copy / prepared.chunks("validation")[0].name
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(UserError, match=rf"{chunk.name} is damaged"):
        PreparedData(copy).verify()


def test_bytes_per_token_turns_nats_into_bits_per_byte(copy: Path, prepared: PreparedData) -> None:
    documents = list(prepared.documents("validation"))
    size = sum(map(len, documents))
    assert prepared.bytes_per_token() == size / (size + len(documents))
    record = json.loads((copy / "prepared.json").read_text())
    record["counts"]["validation"] = {"documents": 0, "tokens": 0, "bytes": 0, "invalid_utf8": 0}
    record["chunks"]["validation"] = []
    (copy / "prepared.json").write_text(json.dumps(record))
    empty = PreparedData(copy)
    assert math.isnan(empty.bytes_per_token())
    assert list(empty.documents("validation")) == []
