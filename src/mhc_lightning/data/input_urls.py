"""Input behind URLs: objects of a store (`s3://`, `gs://`, …), files of a web server; by fsspec."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from mhc_lightning.data.formats.streams import BUFFER_BYTES
from mhc_lightning.errors import UserError

# What a file system may know a file's content by, the surest first.
_VERSIONS = (
    *("ETag", "etag", "Content-MD5", "content_md5", "Digest", "VersionId", "generation", "sha256"),
    *("Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created"),
)


def is_url(path: str) -> bool:
    """True if an input is behind a URL; `hf://NAME` is a dataset, `hf://datasets/…` are files."""
    return "://" in path and (not path.startswith("hf://") or path.startswith("hf://datasets/"))


def is_web(path: str) -> bool:
    """True for a file of a web server, which is best read from its beginning to its end."""
    return path.startswith(("http://", "https://"))


def list_url(url: str, options: Mapping[str, Any] | None) -> Iterator[tuple[str, str, int, str]]:
    """The files of a URL: of a folder in a store all files below it, else the one.

    Args:
        url: The URL.
        options: Options of the file system.

    Yields:
        URL, path below the input, size in bytes, and version of each, sorted by path.

    Raises:
        UserError: The URL cannot be read, or the server does not say a file's size.
    """
    system, root = _file_system(url, options)
    with _named(url):
        if is_web(url) or not system.isdir(root):
            found = {root: system.info(root)}
        else:
            # Asked one by one: a listing may say less of a file, and say it otherwise.
            found = {path: system.info(path) for path in system.find(root)}
        for path, info in sorted(found.items()):
            name = path if path == root else path[len(root.rstrip("/")) + 1 :]
            address = url if path == root else system.unstrip_protocol(path)
            if info.get("size") is None:
                raise UserError(
                    f"the server of input {address} does not say how large it is; download it first"
                )
            yield address, name.rsplit("/", 1)[-1] if path == root else name, *_state(info)


@contextmanager
def open_url(
    url: str, size: int, version: str, options: Mapping[str, Any] | None, seek: bool
) -> Iterator[BinaryIO]:
    """Open a file behind a URL.

    Args:
        url: The URL.
        size: Bytes that it had when it was found.
        version: Its version then.
        options: Options of the file system.
        seek: Read from places all over the file; else from its beginning to its end.

    Raises:
        UserError: It cannot be read, or has changed.
    """
    system, path = _file_system(url, options)
    with _named(url):
        if _state(system.info(path)) != (size, version):
            raise UserError(f"input {url} changed since it was found; run `prepare` again")
        file = system.open(path, "rb", **({"block_size": 0} if is_web(url) and not seek else {}))
    try:
        yield cast(BinaryIO, io.BufferedReader(_UrlStream(file, url), BUFFER_BYTES))
    finally:
        file.close()


def _file_system(url: str, options: Mapping[str, Any] | None) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    # Made anew in each process: a file system of another one does not survive a fork.
    with _named(url):
        system, path = url_to_fs(url, **(options or {}))
    return system, path


def _state(info: Mapping[str, Any]) -> tuple[int, str]:
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    return int(info["size"]), version


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Turn what a file system raises, whatever it is, into one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"input {url} does not exist, or its server is not reached") from error
    except ImportError as error:
        raise UserError(f"input {url} needs another package: {_line(error)}") from error
    except Exception as error:  # clients have errors of their own
        raise UserError(
            f"input {url} cannot be read ({_line(error)}); check the address, the network and"
            " storage_options=…, or download it first"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _UrlStream(io.RawIOBase):
    """A file of fsspec, whose errors name it."""

    def __init__(self, file: Any, url: str) -> None:
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _named(self._url):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with _named(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
