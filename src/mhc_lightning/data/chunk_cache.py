"""Chunks of an object store, fetched into a local folder when they are needed, or just before.

litdata's downloaders do the transfer. Several processes share the folder: a lock per chunk makes
one of them fetch it while the others wait, and a file that is thrown out while another process
reads it stays readable there.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mhc_lightning.errors import UserError

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

_RETRY_SECONDS = (1.0, 4.0)
_CACHE_VARIABLE = "MHC_LIGHTNING_CACHE"


def is_url(path: str) -> bool:
    """Whether a path names an object store rather than a local folder."""
    return "://" in path or path.startswith("local:")


class ChunkCache:
    """Local copies of the files below a URL.

    Args:
        url: ``s3://``, ``gs://``, ``azure://``, ``r2://``, ``hf://``, or ``local:`` and
            ``file://`` for a mounted folder that is slow to read.
        folder: Where the copies go; by default below ``$MHC_LIGHTNING_CACHE``, else
            ``~/.cache/mhc_lightning``.
        storage_options: Passed to the object store's client.
        max_bytes: Above this the least recently used chunks are deleted; by default three quarters
            of what is free on that disk now.
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
        """Choose the folder for data of this checksum, and return it."""
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
            UserError: It is not there or cannot be fetched.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            self._transfer(name, path, with_obstore=False)
            return path.read_bytes()

    def keep_small(self, name: str) -> None:
        """Put a small file beside the chunks."""
        path = self.folder / name
        if not path.exists():
            content = self.fetch_small(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with _written_aside(path) as stream:
                stream.write(content)

    def fetch(self, name: str, size: int) -> None:
        """Have a chunk in the folder.

        Raises:
            UserError: It is not there, cannot be fetched, or has another size.
        """
        from filelock import FileLock

        path = self.folder / name
        if self._is_complete(path, size):
            with contextlib.suppress(FileNotFoundError):
                # Used now, but unchanged: only what changed is compared with its checksum again.
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.wait"):
            if self._is_complete(path, size):
                return
            path.unlink(missing_ok=True)
            self._transfer(name, path, with_obstore=True)
        if not self._is_complete(path, size):
            found = path.stat().st_size
            path.unlink()
            raise UserError(
                f"chunk {self.url}/{name} has {found} bytes, not {size};"
                " copy the prepared folder to the object store again"
            )

    def discard(self, name: str) -> None:
        """Throw a copy away, so that it is fetched anew."""
        (self.folder / name).unlink(missing_ok=True)

    def prefetch(self, wanted: Sequence[tuple[str, int]]) -> None:
        """Fetch chunks (name, size) in the background, after making room for them.

        A failure shows when the chunk is read.
        """

        def work() -> None:
            self._make_room(wanted)
            for name, size in wanted:
                with contextlib.suppress(UserError):
                    self.fetch(name, size)

        threading.Thread(target=work, name="prefetch-chunks", daemon=True).start()

    def _make_room(self, wanted: Sequence[tuple[str, int]]) -> None:
        used = []
        for path in self.folder.glob("*/*.bin"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                used.append((status.st_atime, status.st_size, path))
        kept = {name for name, _ in wanted}
        missing = sum(size for name, size in wanted if not (self.folder / name).exists())
        excess = sum(size for _, size, _ in used) + missing - (self.max_bytes or 0)
        for _, size, path in sorted(used):
            if excess > 0 and path.relative_to(self.folder).as_posix() not in kept:
                path.unlink(missing_ok=True)
                excess -= size

    def _own_downloader(self) -> Any:
        if self._process != os.getpid():
            from litdata.streaming.downloader import get_downloader

            self._downloader = get_downloader(self.url, str(self.folder), [], self.storage_options)
            self._process = os.getpid()
        return self._downloader

    def _transfer(self, name: str, path: Path, with_obstore: bool) -> None:
        """Download a file, trying again if that fails.

        litdata's `download_file` uses obstore where it can, which is fast. But its threads in this
        process would keep it from working in processes forked later, and it refuses stores without
        TLS; the store's own client, behind `download_fileobj`, has neither trouble.
        """
        from litdata.streaming.downloader import Downloader

        url = f"{self.url}/{name}"
        for pause in (*_RETRY_SECONDS, None):
            try:
                downloader = self._own_downloader()
                plain = type(downloader).download_fileobj is not Downloader.download_fileobj
                if plain and not with_obstore:
                    with _written_aside(path) as stream:
                        downloader.download_fileobj(url, stream)
                else:
                    downloader.download_file(url, str(path))
                if not path.exists():  # some of them keep silent about a missing file
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


@contextlib.contextmanager
def _written_aside(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name only when all of it is written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
