"""Input behind URLs: the same documents as from a disk, and one line where it fails."""

import gzip
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from mhc_lightning.data import PreparedData, prepare
from mhc_lightning.data.input_urls import is_url
from mhc_lightning.errors import UserError

SETTINGS: dict[str, Any] = {"validation_fraction": 0.0, "progress": False, "chunk_bytes": 20_000}
TEXTS = [f"document {number} é " * 40 for number in range(100)]


class RangeHandler(SimpleHTTPRequestHandler):
    """Serves whole files and ranges of them, as web servers do; Python's own serves whole ones."""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        if wanted is None:
            super().do_GET()
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = (
            int(end or len(data) - 1) for end in wanted.removeprefix("bytes=").split("-")
        )
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *args: object) -> None:
        pass


class WholeHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of each kind of reading: streamed, compressed, sought."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "deep/c.parquet", row_group_size=20)
    with zipfile.ZipFile(folder / "d.zip", "w") as archive:
        archive.writestr("e.jsonl", lines)
    (folder / "f.txt").write_text("\n".join(TEXTS))
    (folder / ".hidden").write_text("hidden")
    return folder


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., str]]:
    servers = []

    def start(handler: type[SimpleHTTPRequestHandler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def content(folder: Path) -> str:
    return PreparedData(folder).record.content


def test_which_inputs_are_urls() -> None:
    assert is_url("https://x/y.txt") and is_url("s3://x/y") and is_url("memory://x")
    assert is_url("hf://datasets/owner/name/file.parquet")
    assert not is_url("hf://owner/name") and not is_url("folder/file.txt")


def test_a_folder_in_a_store_is_as_one_on_a_disk(folder: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/in", recursive=True)
    try:
        for workers in (1, 2):
            summary = prepare(
                "memory://bucket/in", tmp_path / f"url{workers}", num_workers=workers, **SETTINGS
            )
        prepare(folder, tmp_path / "disk", num_workers=1, **SETTINGS)
        assert summary.total.documents == 401
        assert (
            content(tmp_path / "url1") == content(tmp_path / "url2") == content(tmp_path / "disk")
        )
        listings = [(tmp_path / out / "inputs.jsonl").read_text() for out in ("url1", "disk")]
        assert listings[0] == listings[1]
        assert prepare("memory://bucket/in", tmp_path / "url1", **SETTINGS).reused
        summary = prepare("memory://bucket/in/f.txt", tmp_path / "one", **SETTINGS)
        assert summary.total.documents == 1
        store.pipe("/bucket/in/f.txt", b"another text")
        with pytest.raises(UserError, match="holds other input"):
            prepare("memory://bucket/in", tmp_path / "url1", **SETTINGS)
    finally:
        store.rm("/bucket", recursive=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_files_of_a_web_server(
    folder: Path, tmp_path: Path, serve: Callable[..., str], workers: int
) -> None:
    names = ("a.jsonl", "b.jsonl.gz", "deep/c.parquet", "d.zip")
    server = serve(RangeHandler)
    urls = [f"{server}/{name}" for name in names]
    summary = prepare(urls, tmp_path / "url", num_workers=workers, **SETTINGS)
    assert summary.total.documents == 400
    found = sorted(PreparedData(tmp_path / "url").documents("train"))
    assert found == sorted(text.encode() for text in TEXTS * 4)


def test_a_server_of_whole_files_is_enough_for_what_is_read_in_order(
    folder: Path, tmp_path: Path, serve: Callable[..., str]
) -> None:
    server = serve(WholeHandler)
    urls = [f"{server}/a.jsonl", f"{server}/b.jsonl.gz", f"{server}/f.txt"]
    assert prepare(urls, tmp_path / "url", **SETTINGS).total.documents == 201


def test_what_cannot_be_read_is_one_line(
    folder: Path, tmp_path: Path, serve: Callable[..., str]
) -> None:
    server = serve(RangeHandler)
    for url, message in (
        (f"{server}/absent.txt", "absent.txt does not exist, or its server is not reached"),
        ("http://127.0.0.1:9/x.txt", "does not exist, or its server is not reached"),
        ("memory://absent/x.txt", "does not exist"),
        ("nosuch://x/y.txt", "cannot be read .Protocol not known: nosuch"),
        ("oss://bucket/y.txt", "oss://bucket/y.txt needs another package: .*ossfs"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            prepare(url, tmp_path / "out", **SETTINGS)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
