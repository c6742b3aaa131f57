"""A local cache of the chunk files of a prepared folder in an object store.

litdata's downloaders transfer the files. litdata's own reader is not used: it compares no chunk
with a checksum, and prefetches in its own order. fsspec's `filecache` is not used: it has no limit
in bytes.

Several processes share the folder. A lock per chunk lets one process fetch the chunk while the
others wait. A deleted file stays readable in processes that have it open.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhc_lightning.errors import UserError
from mhc_lightning.files.atomic import written_aside

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

_RETRY_SECONDS = (1.0, 4.0)
_CACHE_VARIABLE = "MHC_LIGHTNING_CACHE"


def is_url(path: str) -> bool:
    """True if a path is the URL of an object store, False for a local folder."""
    return "://" in path or path.startswith("local:")


class ChunkCache:
    """Local copies of the files below a URL.

    Args:
        url: `s3://`, `gs://`, `azure://`, `r2://`, `hf://`, or `local:` and
            `file://` for a mounted folder that is slow to read.
        folder: Folder for the copies; by default below `$MHC_LIGHTNING_CACHE`, else
            `~/.cache/mhc_lightning`.
        storage_options: Options of the object store's client.
        max_bytes: Largest size of the cache, beyond which the least recently used chunks are
            deleted; by default three quarters of the free space on that disk.
    """

    def __init__(
        self,
        url: str,
        folder: str | Path | None = None,
        storage_options: dict[str, Any] | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.url = url.replace("file://", "local:", 1).rstrip("/")
        self.storage_options = storage_options
        default = os.environ.get(_CACHE_VARIABLE) or Path.home() / ".cache" / "mhc_lightning"
        self._root = Path(folder or default)
        self.folder = self._root
        self.max_bytes = max_bytes
        self._process: int | None = None
        self._downloader: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_downloader": None}

    def bind(self, content: str) -> Path:
        """Use the cache folder of data with this checksum, and return its path."""
        name = hashlib.sha256(f"{self.url}\n{content}".encode()).hexdigest()[:20]
        self.folder = self._root / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot keep chunks of {self.url} in {self.folder}: {error.strerror};"
                " choose another folder with data.cache_dir=…"
            ) from error
        if self.max_bytes is None:
            self.max_bytes = shutil.disk_usage(self.folder).free * 3 // 4
        return self.folder

    def fetch_small(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            UserError: The file does not exist or cannot be fetched.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            self._transfer(name, path, with_obstore=False)
            return path.read_bytes()

    def keep_small(self, name: str) -> None:
        """Fetch a small file into the cache folder, unless it is there."""
        path = self.folder / name
        if not path.exists():
            content = self.fetch_small(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(path) as stream:
                stream.write(content)

    def fetch(self, name: str, size: int) -> None:
        """Fetch a chunk into the cache folder, unless it is there.

        Raises:
            UserError: The chunk does not exist, cannot be fetched, or has another size.
        """
        from filelock import FileLock

        path = self.folder / name
        if self._is_complete(path, size):
            with contextlib.suppress(FileNotFoundError):
                # Mark it as used, not as changed: a changed file is compared with its checksum.
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.wait"):
            if self._is_complete(path, size):
                return
            path.unlink(missing_ok=True)
            self._transfer(name, path, with_obstore=True)
        if not self._is_complete(path, size):
            actual = path.stat().st_size
            path.unlink()
            raise UserError(
                f"chunk {self.url}/{name} has {actual} bytes, not {size};"
                " copy the prepared folder to the object store again"
            )

    def discard(self, name: str) -> None:
        """Delete a copy, so that it is fetched again."""
        (self.folder / name).unlink(missing_ok=True)

    def prefetch(self, chunks: Sequence[tuple[str, int]]) -> None:
        """Fetch chunks (name, size) in the background, after making room for them.

        Errors are raised when the chunk is read.
        """

        def work() -> None:
            self._make_room(chunks)
            for name, size in chunks:
                with contextlib.suppress(UserError):
                    self.fetch(name, size)

        threading.Thread(target=work, name="prefetch-chunks", daemon=True).start()

    def _make_room(self, chunks: Sequence[tuple[str, int]]) -> None:
        """Delete the least recently used chunks until the given ones fit; keep the given ones."""
        cached = []
        for path in self.folder.glob("*/*.bin"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                cached.append((status.st_atime, status.st_size, path))
        protected = {name for name, _ in chunks}
        missing = sum(size for name, size in chunks if not (self.folder / name).exists())
        excess = sum(size for _, size, _ in cached) + missing - (self.max_bytes or 0)
        for _, size, path in sorted(cached):
            if excess > 0 and path.relative_to(self.folder).as_posix() not in protected:
                path.unlink(missing_ok=True)
                excess -= size

    def _own_downloader(self) -> Any:
        """The downloader of this process: forked processes must not share a client."""
        if self._process != os.getpid():
            from litdata.streaming.downloader import get_downloader

            self._downloader = get_downloader(self.url, str(self.folder), [], self.storage_options)
            self._process = os.getpid()
        return self._downloader

    def _transfer(self, name: str, path: Path, with_obstore: bool) -> None:
        """Download a file, with up to two retries.

        litdata's `download_file` uses obstore where it can, which is fast. But obstore does not
        work in a process that is forked after its threads start, and it refuses stores without TLS.
        `download_fileobj` uses the store's own client, which has neither limitation.
        """
        from litdata.streaming.downloader import Downloader

        url = f"{self.url}/{name}"
        for pause in (*_RETRY_SECONDS, None):
            try:
                downloader = self._own_downloader()
                has_client = type(downloader).download_fileobj is not Downloader.download_fileobj
                if has_client and not with_obstore:
                    with written_aside(path) as stream:
                        downloader.download_fileobj(url, stream)
                else:
                    downloader.download_file(url, str(path))
                if not path.exists():  # some downloaders do not report a missing file
                    raise FileNotFoundError(f"{url} does not exist")
                return
            except Exception as error:
                if pause is None or isinstance(error, FileNotFoundError | ImportError):
                    reason = str(error).strip().splitlines() or [type(error).__name__]
                    raise UserError(
                        f"cannot fetch {url}: {reason[0]};"
                        " check data.path, the credentials and the network"
                    ) from error
                with_obstore = False
                time.sleep(pause)

    @staticmethod
    def _is_complete(path: Path, size: int) -> bool:
        try:
            return path.stat().st_size == size
        except FileNotFoundError:
            return False
