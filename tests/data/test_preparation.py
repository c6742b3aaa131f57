"""`prepare` keeps every document once, and no interruption leaves half a folder."""

import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhc_lightning.data import (
    ByteTokenizer,
    JsonTokenizer,
    PreparedData,
    prepare,
    unit_tokenization,
    worker_pool,
)
from mhc_lightning.data.prepared_record import SPLITS
from mhc_lightning.errors import UserError

Write = Callable[..., Path]
SMALL: dict[str, Any] = {
    "chunk_bytes": 12_000,
    "validation_fraction": 0.3,
    "num_workers": 1,
    "progress": False,
}


def contents(folder: Path) -> dict[str, str]:
    """Checksums of all files below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def documents(folder: Path) -> list[bytes]:
    prepared = PreparedData(folder)
    return sorted(document for split in SPLITS for document in prepared.documents(split))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, write_texts: Write) -> Path:
    return write_texts(tmp_path_factory.mktemp("written"), 40)


@pytest.fixture(scope="module")
def finished(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of these texts, to be read only."""
    output = tmp_path_factory.mktemp("finished") / "out"
    prepare(written, output, **SMALL)
    return output


@pytest.fixture
def output(tmp_path: Path, finished: Path) -> Path:
    """A copy of that, beside `texts`."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def texts(tmp_path: Path, written: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "in put=1"))


def test_every_document_is_there_once_with_its_boundary(texts: Path, tmp_path: Path) -> None:
    summary = prepare(texts, tmp_path / "out", **SMALL)
    originals = sorted(path.read_bytes() for path in texts.iterdir())
    assert documents(tmp_path / "out") == originals
    total = summary.total
    assert total.documents == len(originals)
    assert total.bytes == sum(map(len, originals))
    assert total.tokens == total.bytes + total.documents
    assert summary.bytes_per_token == total.bytes / total.tokens
    assert 0 < summary.record.counts["validation"].documents < 20


def test_summary_says_what_was_done(texts: Path, tmp_path: Path) -> None:
    (texts / "a.pyc").write_bytes(b"\0\1\2")
    (texts / "empty.txt").touch()
    (texts / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    text = str(prepare(texts, tmp_path / "out", **SMALL))
    assert "is prepared" in text
    for part in ("bytes per token", "1 binary file skipped", "1 empty document skipped"):
        assert part in text
    assert "1 document with invalid UTF-8" in text
    assert b"caf\xe9" in documents(tmp_path / "out")


def test_the_result_does_not_depend_on_the_workers(texts: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        prepare(texts, tmp_path / f"out{workers}", **{**SMALL, "num_workers": workers})
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    assert len(PreparedData(tmp_path / "out1").chunks("train")) > 5


def test_litdata_reads_the_chunks(prepared: PreparedData, prepared_path: Path) -> None:
    from litdata import StreamingDataset, TokensLoader

    for split in SPLITS:
        dataset = StreamingDataset(str(prepared_path / split), item_loader=TokensLoader(64))
        tokens = np.concatenate([prepared.tokens(chunk) for chunk in prepared.chunks(split)[:1]])
        read = np.concatenate([np.asarray(dataset[row]) for row in range(len(tokens) // 64)])
        assert np.array_equal(read, tokens[: len(read)])


def test_json_tokenizer_is_copied_and_used(
    texts: Path, tmp_path: Path, tokenizer_file: Path
) -> None:
    summary = prepare(texts, tmp_path / "out", tokenizer=tokenizer_file, **SMALL)
    tokenizer = PreparedData(tmp_path / "out").tokenizer
    assert tokenizer.fingerprint == JsonTokenizer(tokenizer_file).fingerprint
    encoded = [tokenizer.encode(path.read_bytes()) for path in texts.iterdir()]
    assert summary.total.tokens == sum(map(len, encoded)) + len(encoded)
    assert documents(tmp_path / "out") == sorted(path.read_bytes() for path in texts.iterdir())


def test_jsonl_and_compressed_files_are_read(tmp_path: Path) -> None:
    rows = [f"row {number}" * 20 for number in range(200)]
    lines = "".join(json.dumps({"body": row}) + "\n" for row in rows).encode()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    prepare(tmp_path / "rows.jsonl.gz", tmp_path / "out", text_field="body", **SMALL)
    assert documents(tmp_path / "out") == sorted(row.encode() for row in rows)
    with pytest.raises(UserError, match="no field 'text' but 'body'"):
        prepare(tmp_path / "rows.jsonl.gz", tmp_path / "other", **SMALL)
    assert not (tmp_path / "other").exists()


def test_mistakes_in_workers_arrive_as_they_are(texts: Path, tmp_path: Path) -> None:
    (texts / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"line 1 of .*bad\.jsonl is no JSON"):
        prepare(texts, tmp_path / "out", **{**SMALL, "num_workers": 2})


def test_finished_output_is_recognised(texts: Path, output: Path) -> None:
    before, record = contents(output), PreparedData(output).record
    again = prepare(texts, output, **SMALL)
    assert again.reused and again.record == record, "wherever the texts are"
    assert "already" in str(again)
    assert contents(output) == before


def test_other_content_is_kept_unless_told(texts: Path, output: Path, tmp_path: Path) -> None:
    before = contents(output)
    (texts / "one more.txt").write_text("more")
    with pytest.raises(UserError, match=r"holds other input or settings; .*overwrite=true"):
        prepare(texts, output, **SMALL)
    assert contents(output) == before
    prepare(texts, output, overwrite=True, **SMALL)
    assert b"more" in documents(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in put=1", "out"]


def test_a_damaged_output_is_not_taken_for_finished(texts: Path, output: Path) -> None:
    next((output / "train").glob("*.bin")).unlink()
    with pytest.raises(UserError, match="is damaged"):
        prepare(texts, output, **SMALL)
    prepare(texts, output, overwrite=True, **SMALL)
    PreparedData(output).verify()


def test_a_folder_of_something_else_is_never_replaced(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not a prepared folder"):
            prepare(texts, tmp_path / "out", overwrite=overwrite, **SMALL)
    assert (tmp_path / "out/thesis.tex").read_text() == "precious"


def test_an_interrupted_run_is_taken_up_where_it_stopped(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_tokenization, "_BATCH_BYTES", 1)
    prepare(texts, tmp_path / "whole", **SMALL)
    output = tmp_path / "out"
    encoded: list[bytes] = []
    original = ByteTokenizer.encode_documents

    def encode(self: ByteTokenizer, batch: list[bytes]) -> list[np.ndarray]:
        if len(encoded) == 21:  # in the middle of a unit
            raise KeyboardInterrupt
        encoded.extend(batch)
        return original(self, batch)

    monkeypatch.setattr(ByteTokenizer, "encode_documents", encode)
    with pytest.raises(KeyboardInterrupt):
        prepare(texts, output, **SMALL)
    assert not output.exists()
    encoded.append(b"past the interruption")
    prepare(texts, output, **SMALL)
    # The documents of finished units were encoded once, those of the broken one twice.
    repeated = len(encoded) - 1 - 40
    assert 0 < repeated <= 4
    assert contents(output) == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.preparing").exists()


@pytest.mark.parametrize("name", ["chunk-0-0.bin", "validation.npy", "unit.json"])
def test_a_damaged_unit_of_an_interrupted_run_is_done_again(
    texts: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mhc_lightning.data.preparation.write_prepared", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(texts, tmp_path / "out", **SMALL)
    found = sorted((tmp_path / ".out.preparing/units").glob(f"*/{name}"))
    for path in found[:3]:
        data = bytearray(path.read_bytes())
        data[-99] ^= 1
        path.write_bytes(data)
    assert found
    again = prepare(texts, tmp_path / "out", **SMALL)
    assert again.record.content == PreparedData(finished).record.content
    made, whole = contents(tmp_path / "out"), contents(finished)
    assert made.keys() == whole.keys()
    assert {name for name in made if made[name] != whole[name]} == {"prepared.json"}, "other paths"


def test_a_folder_of_an_earlier_version_is_recognised_and_made_anew_if_told(
    texts: Path, output: Path
) -> None:
    first = PreparedData(output).record
    record = json.loads((output / "prepared.json").read_text())
    for key in ("checksum", "files", "forms"):
        del record[key]
    for chunk in [*record["chunks"]["train"], *record["chunks"]["validation"]]:
        del chunk["xxh3"]
    (output / "prepared.json").write_text(json.dumps(record))
    found = prepare(texts, output, **SMALL)
    assert found.reused and "an earlier version made it, without checksums" in str(found)
    made = prepare(texts, output, overwrite=True, **SMALL)
    assert not made.reused and made.record.chunks == first.chunks
    assert made.record.files == first.files
    assert prepare(texts, output, overwrite=True, **SMALL).reused


def test_what_files_are_taken_for_is_part_of_what_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("some text\n" * 99)
    (tmp_path / "in/b.dat").write_bytes(bytes(range(256)))
    first = prepare(tmp_path / "in", tmp_path / "out", progress=False)
    assert "skipped as binary: 1 file (1 .dat)" in str(first)
    assert "taken for plain text: 1 file (1 .txt)" in str(first)
    assert prepare(tmp_path / "in", tmp_path / "out", progress=False).reused
    with pytest.raises(UserError, match="holds other input or settings"):
        prepare(tmp_path / "in", tmp_path / "out", as_text=["*.dat"], progress=False)


def test_nul_bytes_are_kept_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\0" + b"some text\n" * 99)
    (tmp_path / "b.jsonl").write_text('{"text": "a\\u0000b"}\n{"text": "c"}\n')
    summary = prepare(tmp_path, tmp_path / "out", validation_fraction=0, progress=False)
    assert "2 documents with NUL bytes" in str(summary)
    assert {b"a\0b", b"\0" + b"some text\n" * 99} < set(documents(tmp_path / "out"))


def test_leftovers_of_other_settings_are_cleared(texts: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".out.preparing/units/000000"
    stale.mkdir(parents=True)
    (stale / "unit.json").write_text("{}")
    (tmp_path / ".out.preparing/plan.json").write_text('{"identity": "another"}')
    prepare(texts, tmp_path / "out", **SMALL)
    assert documents(tmp_path / "out") == sorted(path.read_bytes() for path in texts.iterdir())


def test_kill_leaves_nothing_half_done_and_no_processes(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*args: Any) -> None:
        unit_tokenization.tokenize_unit(*args)
        time.sleep(0.2)

    output, units = tmp_path / "out", tmp_path / ".out.preparing/units"
    with monkeypatch.context() as patch:
        patch.setattr(worker_pool, "tokenize_unit", slowly)
        process = multiprocessing.get_context("fork").Process(
            target=prepare, args=(texts, output), kwargs={**SMALL, "num_workers": 2}
        )
        process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(units.glob("??????"))) < 3:
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.join()
    assert children and not output.exists()
    finished = {unit.name: unit.stat().st_mtime_ns for unit in units.glob("??????")}
    assert 3 <= len(finished) < 10
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in children):
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
    prepare(texts, output, **SMALL)
    assert documents(output) == sorted(path.read_bytes() for path in texts.iterdir())


def test_two_runs_do_not_mix(texts: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    with (
        FileLock(tmp_path / ".out.lock"),
        pytest.raises(UserError, match="being prepared by another process"),
    ):
        prepare(texts, tmp_path / "out", **SMALL)


def test_the_output_is_no_input_of_itself(texts: Path) -> None:
    first = prepare(texts, texts / "out", **SMALL)
    assert prepare(texts, texts / "out", **SMALL).reused
    assert first.total.documents == 40


def test_useless_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=r"no files in .*/in; name a folder or files"):
        prepare(tmp_path / "in", tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="absent does not exist"):
        prepare(tmp_path / "absent", tmp_path / "out", progress=False)
    (tmp_path / "in/a.so").write_bytes(b"\0")
    (tmp_path / "in/b.txt").touch()
    with pytest.raises(UserError, match="1 binary files, 1 empty documents"):
        prepare(tmp_path / "in", tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="that match include"):
        prepare(tmp_path / "in", tmp_path / "out", include=["*.rs"], progress=False)
    assert not (tmp_path / "out").exists()


def test_everything_held_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match="fell into the validation split"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", validation_fraction=0.999, progress=False)


def test_wrong_settings_are_refused(texts: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0"),
        ({"tokenizer": tmp_path / "none.json"}, "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(texts, tmp_path / "out", progress=False, **settings)


def test_an_output_that_cannot_be_written_is_named(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out cannot be written: "):
        prepare(texts, tmp_path / "file/out", **SMALL)


def test_disk_full_keeps_what_is_finished(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(UserError, match=r"No space left on device.*run `prepare` again"):
            prepare(texts, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
    prepare(texts, tmp_path / "out", **SMALL)
    assert len(documents(tmp_path / "out")) == 40


def test_without_a_validation_split(texts: Path, tmp_path: Path) -> None:
    summary = prepare(texts, tmp_path / "out", validation_fraction=0.0, progress=False)
    assert summary.record.chunks["validation"] == []
    assert not (tmp_path / "out/validation").exists()
