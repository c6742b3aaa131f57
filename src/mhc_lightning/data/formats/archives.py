"""Members of ZIP and tar archives, read one after the other without unpacking them to disk."""

import io
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from mhc_lightning.data.formats.streams import Bounded
from mhc_lightning.errors import UserError

_ENCRYPTED = 1  # in the flags of a member
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


@dataclass(frozen=True)
class Member:
    """A file in an archive, with its content, to be read before the next member is.

    Attributes:
        name: Path in the archive, with forward slashes.
        size: Bytes of its content, as the archive says.
        stream: The content.
    """

    name: str
    size: int
    stream: BinaryIO


def zip_sizes(raw: BinaryIO, name: str) -> list[int]:
    """Bytes of each member of a ZIP archive, unpacked; 0 for a folder.

    Raises:
        UserError: A member is encrypted, leads out of the archive's folder, or is compressed in a
            way that is not read here.
    """
    with zipfile.ZipFile(raw) as archive:
        for info in archive.infolist():
            _check_name(info.filename, name)
            if info.flag_bits & _ENCRYPTED:
                raise UserError(
                    f"{info.filename} in input {name} is encrypted; unpack the archive with its"
                    " password, and give the folder"
                )
            if info.compress_type not in _METHODS:
                raise UserError(
                    f"{info.filename} in input {name} is compressed by method"
                    f" {info.compress_type}, which is not read here; unpack the archive, and give"
                    " the folder"
                )
        return [0 if info.is_dir() else info.file_size for info in archive.infolist()]


def zip_members(
    raw: BinaryIO, name: str, start: int, stop: int, max_expansion: float
) -> Iterator[Member]:
    """The members [start, stop) of a ZIP archive; folders and links are left out.

    Args:
        raw: The archive; it has to be seekable.
        name: Name of the archive, for error messages.
        start: The first member.
        stop: Behind the last.
        max_expansion: See `compression.decompressed`; counts for each member.

    Raises:
        UserError: On reading: a member unpacks to more.
    """
    with zipfile.ZipFile(raw) as archive:
        for info in archive.infolist()[start:stop]:
            if info.is_dir():
                continue
            with archive.open(info) as stream:
                if stat.S_ISLNK(info.external_attr >> 16):
                    _check_link(info.filename, stream.read(1 << 12).decode(), name)
                    continue
                bounded = Bounded(
                    stream, f"{name}/{info.filename}", info.compress_size, max_expansion
                )
                yield Member(info.filename, info.file_size, io.BufferedReader(bounded))


def tar_members(stream: BinaryIO, name: str) -> Iterator[Member]:
    """The members of a tar archive; folders, links and devices are left out.

    Args:
        stream: The archive, decompressed; it is read once, from its beginning.
        name: Name of the archive, for error messages.

    Raises:
        UserError: A member leads out of the archive's folder.
    """
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_WholeHeader) as archive:
        for info in archive:
            _check_name(info.name, name)
            if info.issym() or info.islnk():
                # A hard link names its target from the archive's own folder.
                _check_link("" if info.islnk() else info.name, info.linkname, name)
            if info.isfile():
                yield Member(info.name, info.size, cast(BinaryIO, archive.extractfile(info)))


class _WholeHeader(tarfile.TarInfo):
    """A header that has to be whole: tarfile takes noise after a member for the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_WholeHeader":
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error


def _check_name(member: str, archive: str) -> None:
    """Refuse a member whose path leads out of the folder that an archive is unpacked to."""
    path = member.replace("\\", "/")  # a slash and a drive, to Windows
    if path.startswith("/") or ".." in path.split("/") or path[1:3] == ":/":
        raise UserError(
            f"{member} in input {archive} leads out of the archive's folder, as in an attack; do"
            " not trust this archive, or pack its files again"
        )


def _check_link(member: str, target: str, archive: str) -> None:
    """Refuse a link that leads out of the folder of an archive; what it links to is a member."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(member), target))
    if path.startswith(("/", "../")) or path == "..":
        raise UserError(
            f"{member or 'a link'} in input {archive} links to {target}, out of the archive's"
            " folder, as in an attack; do not trust this archive, or pack its files again"
        )
