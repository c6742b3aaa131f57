"""Chunks of a URL are fetched when needed, checked, and deleted for room."""

import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhc_lightning.data import PreparedData, chunk_cache, prepare
from mhc_lightning.data.chunk_cache import ChunkCache, is_url
from mhc_lightning.data.training_sequences import TrainingSequences
from mhc_lightning.errors import UserError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_cache, "_RETRY_SECONDS", (0.0, 0.0))


@pytest.fixture
def url(prepared_path: Path) -> str:
    return f"local:{prepared_path}"


def kept(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*.bin")}


def test_urls_are_told_from_paths() -> None:
    assert all(map(is_url, ("s3://bucket/x", "gs://b/x", "local:/x", "file:///x")))
    assert not any(map(is_url, ("/x", "a b/=", "C=x", "relative")))


def test_chunks_are_fetched_when_read(prepared: PreparedData, url: str, tmp_path: Path) -> None:
    far = PreparedData(url, cache_dir=tmp_path / "cache")
    assert far.record == prepared.record
    assert not kept(tmp_path / "cache")
    chunk = far.chunks("train")[1]
    assert np.array_equal(far.tokens(chunk), prepared.tokens(chunk))
    assert kept(tmp_path / "cache") == {Path(chunk.name).name}
    far.verify()
    assert len(kept(tmp_path / "cache")) == len(far.all_chunks())


def test_file_urls_and_the_default_folder(
    prepared_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MHC_LIGHTNING_CACHE", str(tmp_path / "elsewhere"))
    far = PreparedData(f"file://{prepared_path}")
    far.tokens(far.chunks("train")[0])
    assert len(kept(tmp_path / "elsewhere")) == 1


def test_a_kept_chunk_is_not_fetched_again(url: str, tmp_path: Path, monkeypatch) -> None:
    far = PreparedData(url, cache_dir=tmp_path)
    chunk = far.chunks("train")[0]
    far.tokens(chunk)
    again = PreparedData(url, cache_dir=tmp_path)
    monkeypatch.setattr(ChunkCache, "_own_downloader", lambda self: 1 / 0)
    again.tokens(chunk)


def test_tokenizer_is_fetched(tokenizer_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\n" * 100)
    prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer_file, progress=False)
    far = PreparedData(f"local:{tmp_path / 'out'}", cache_dir=tmp_path / "cache")
    assert far.tokenizer.fingerprint == far.record.tokenizer["fingerprint"]
    assert b"".join(far.documents("train")).startswith(b"the cat\n")


def test_absent_and_damaged_objects_are_named(prepared_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot fetch local:/absent/prepared\.json"):
        PreparedData("local:/absent", cache_dir=tmp_path / "cache")
    store = Path(shutil.copytree(prepared_path, tmp_path / "store"))
    far = PreparedData(f"local:{store}", cache_dir=tmp_path / "cache")
    first, second = far.chunks("train")[:2]
    (store / first.name).write_bytes(b"short")
    with pytest.raises(UserError, match=rf"{first.name} has 5 bytes, not {first.size}"):
        far.tokens(first)
    (store / second.name).unlink()
    with pytest.raises(UserError, match=rf"cannot fetch .*{second.name}"):
        far.tokens(second)
    assert not kept(tmp_path / "cache")


def test_damaged_copies_are_fetched_anew(
    tokenizer_file: Path, tmp_path: Path, prepared_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("the cat\n" * 100)
    prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer_file, progress=False)
    url, cache = f"local:{tmp_path / 'out'}", tmp_path / "cache"
    far = PreparedData(url, cache_dir=cache)
    chunk = far.chunks("train")[0]
    far.tokens(chunk)
    for path in [path for path in cache.rglob("*") if path.suffix in (".bin", ".json")]:
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
    again = PreparedData(url, cache_dir=cache)
    assert again.tokenizer.fingerprint == far.record.tokenizer["fingerprint"]
    near = PreparedData(tmp_path / "out")
    assert np.array_equal(again.tokens(chunk), near.tokens(chunk))


@pytest.mark.parametrize("index", [False, True])
def test_damaged_objects_are_named_by_their_url(
    prepared_path: Path, tmp_path: Path, index: bool
) -> None:
    store = Path(shutil.copytree(prepared_path, tmp_path / "store"))
    far = PreparedData(f"local:{store}", cache_dir=tmp_path / "cache")
    chunk = far.chunks("train")[0]
    name = "train/index.json" if index else chunk.name
    data = bytearray((store / name).read_bytes())
    data[-9] ^= 1
    (store / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"local:{store}/{name} is damaged .*the object store"):
        PreparedData(f"local:{store}", cache_dir=tmp_path / "cache2").tokens(chunk)
    assert not kept(tmp_path / "cache2")


def test_a_copy_that_is_used_counts_as_unchanged(url: str, tmp_path: Path) -> None:
    far = PreparedData(url, cache_dir=tmp_path)
    chunk = far.chunks("train")[0]
    far.tokens(chunk)
    assert far.cache is not None
    before = (far.cache.folder / chunk.name).stat()
    os.utime(far.cache.folder / chunk.name, ns=(5, before.st_mtime_ns))
    far.tokens(chunk)
    after = (far.cache.folder / chunk.name).stat()
    assert after.st_mtime_ns == before.st_mtime_ns and after.st_atime_ns > 5


def test_failures_that_pass_are_tried_again(url: str, tmp_path: Path, monkeypatch) -> None:
    from litdata.streaming.downloader import LocalDownloader

    far = PreparedData(url, cache_dir=tmp_path)
    original = LocalDownloader.download_file
    calls: list[str] = []

    def flaky(self: Any, source: str, target: str) -> None:
        calls.append(source)
        if len(calls) < 3:
            raise ConnectionError("reset")
        original(self, source, target)

    monkeypatch.setattr(LocalDownloader, "download_file", flaky)
    far.tokens(far.chunks("train")[0])
    assert len(calls) == 3


def test_the_stores_own_client_helps_out(prepared_path: Path, tmp_path: Path) -> None:
    """As with a store without TLS, which obstore refuses."""
    from litdata.streaming import downloader

    class Store(downloader.Downloader):
        def download_file(self, source: str, target: str) -> None:
            raise RuntimeError("builder error")

        def download_fileobj(self, source: str, stream: Any) -> None:
            stream.write((prepared_path / source.removeprefix("store://x/")).read_bytes())

    downloader.register_downloader("store://", Store)
    try:
        far = PreparedData("store://x", cache_dir=tmp_path)
        far.verify()
        assert len(kept(tmp_path)) == len(far.all_chunks())
        assert not list(tmp_path.rglob(".aside-*"))
    finally:
        downloader.unregister_downloader("store://")


def test_a_cache_folder_that_cannot_be_written_is_named(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot keep chunks of .* data\.cache_dir="):
        PreparedData(url, cache_dir=tmp_path / "file")


def test_training_fetches_one_window_ahead(url: str, tmp_path: Path) -> None:
    far = PreparedData(url, cache_dir=tmp_path)
    stream = TrainingSequences([far], [1.0], 64, seed=0, window=2)
    stream = pickle.loads(pickle.dumps(stream))  # as a worker gets it
    order = stream.orders[0]
    stream[0]
    wanted = {
        Path(far.chunks("train")[chunk].name).name
        for window in (0, 1)
        for chunk in order.chunks_of(0, window)
    }
    deadline = time.monotonic() + 20
    while kept(tmp_path) != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert kept(tmp_path) == wanted and len(wanted) == 4


def test_old_chunks_make_room(url: str, tmp_path: Path) -> None:
    far = PreparedData(url, cache_dir=tmp_path)
    cache = far.cache
    assert cache is not None and cache.max_bytes is not None and cache.max_bytes > 10**6
    chunks = far.chunks("train")
    for age, chunk in enumerate(chunks[:4]):
        far.tokens(chunk)
        os.utime(cache.folder / chunk.name, (10**9 + age, 10**9 + age))
    mapped = far.tokens(chunks[1])
    os.utime(cache.folder / chunks[1].name, (10**9 + 1, 10**9 + 1))
    cache.max_bytes = sum(chunks[index].size for index in (0, 3, 4))
    cache._make_room([(chunks[0].name, chunks[0].size), (chunks[4].name, chunks[4].size)])
    assert kept(tmp_path) == {Path(chunks[index].name).name for index in (0, 3)}
    assert len(mapped) == int((mapped >= 0).sum())  # still readable
