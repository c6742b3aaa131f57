"""Writing of files, folders and links, in which no crash can lose the old content."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from mhc_lightning.errors import UserError

ASIDE = ".aside-"  # begins the names of incomplete files and folders


def point_link(link: Path, target_name: str) -> None:
    """Make `link` a relative symbolic link to `target_name` beside it, in one atomic step."""
    aside = link.parent / f"{ASIDE}{link.name}"
    remove(aside)
    aside.symlink_to(target_name)
    os.replace(aside, link)
    sync_folder(link.parent)


def require_links(folder: Path, names: Collection[str]) -> None:
    """Check that links of these names can be made, and would replace nothing but links.

    Raises:
        UserError: A name is a file or folder, or the file system has no symbolic links.
        OSError: The folder cannot be written to.
    """
    for path in (folder / name for name in names):
        if path.exists() and not path.is_symlink():
            raise UserError(
                f"{path} should be a link, but is a copy, as some tools leave in place of one;"
                " delete it if the original is there too, else rename it to step_…"
            )
    probe = folder / f"{ASIDE}probe"
    try:
        probe.symlink_to(probe.name)
        probe.unlink()
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise UserError(
            f"the file system of {folder} has no symbolic links, which {' and '.join(names)} are"
            f" ({error.strerror}); choose another output_dir"
        ) from error


def write_text_atomically(path: Path, text: str) -> None:
    """Replace the file at `path` by `text` (UTF-8) in one atomic, durable step."""
    with written_aside(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path` for writing; at the end it replaces `path` in one durable step.

    If the block raises an exception, `path` stays as it was. Several processes may write the same
    path at a time: the last to finish counts.
    """
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=ASIDE)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path beside `path` to write a file or folder to, which takes the name at the end.

    For one writer at a time: a path that a killed process left aside is removed.

    A file is replaced in one atomic step. An existing folder is moved away first, and moved back
    if the new folder cannot take its name. After an exception nothing is left aside, and `path` is
    as it was.

    Args:
        path: The file or folder.
        durable: True to write all content to the disk (fsync) before the new path takes the name.

    Raises:
        OSError: The file or folder cannot be written.
    """
    aside = path.with_name(f"{ASIDE}{path.name}")
    try:
        remove(aside)
        yield aside
        if durable:
            _sync(aside)
        put_in_place(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(aside)
        raise
    if durable:
        sync_folder(path.parent)


def put_in_place(aside: Path, path: Path) -> None:
    """Rename the complete file or folder `aside` to `path`, and replace what has that name.

    Raises:
        OSError: `aside` cannot be renamed; `path` is as it was.
    """
    if not path.is_dir() or path.is_symlink():
        os.replace(aside, path)
        return
    replaced = path.with_name(f"{ASIDE}replaced-{path.name}")
    remove(replaced)
    os.replace(path, replaced)
    try:
        os.replace(aside, path)
    except OSError:
        os.replace(replaced, path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file, link or folder, if it exists.

    Raises:
        OSError: The path cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Write a file, or all files of a folder, to the disk (fsync)."""
    if path.is_dir():
        for inside in path.iterdir():
            _sync(inside)
        sync_folder(path)
    else:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
