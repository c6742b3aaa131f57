"""Files and links replaced atomically: after a crash either the old or the new one is there."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from mhc_lightning.errors import UserError

ASIDE = ".aside-"  # begins the names of files that are not complete yet


def point_link(link: Path, target_name: str) -> None:
    """Make `link` a relative symbolic link to `target_name` beside it, in one atomic step."""
    aside = link.parent / f"{ASIDE}{link.name}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(target_name)
    os.replace(aside, link)
    sync_folder(link.parent)


def require_links(folder: Path, names: Collection[str]) -> None:
    """Check that links of these names can be made and would replace nothing but links.

    Raises:
        UserError: One of them is a file or folder, or the file system has no symbolic links.
        OSError: The folder cannot be written to.
    """
    for path in (folder / name for name in names):
        if path.exists() and not path.is_symlink():
            raise UserError(
                f"{path} is no link but a copy, as some tools leave in place of one; delete it if"
                " what it is a copy of is there too, else give it that name (step_…)"
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

    If the block raises, `path` stays as it was.
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


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
