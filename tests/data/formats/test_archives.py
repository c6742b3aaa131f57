"""Archives: each member by its own format, and nothing from outside of them."""

import bz2
import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mhc_lightning.data.documents import ReadingLog
from mhc_lightning.data.formats import streams
from mhc_lightning.errors import UserError

Read = Callable[..., tuple[list[bytes], ReadingLog]]
MEMBERS = {
    "a.txt": b"plain text",
    "folder/b.jsonl": b'{"text": "line 1"}\n{"text": "line 2"}\n',
    "folder/c.json.gz": gzip.compress(json.dumps([{"text": "item"}]).encode()),
    "d.csv": "id,text\n1,row\n".encode("utf-16"),
    "e.bz2": bz2.compress(b"\xef\xbb\xbfmarked"),
    "photo.png": bytes(range(256)),
    ".hidden/f.txt": b"hidden",
    "__MACOSX/g.txt": b"left behind",
    "empty.txt": b"",
}
DOCUMENTS = [b"plain text", b"line 1", b"line 2", b"item", b"row", b"marked"]
TAKEN = {
    "a.txt": "plain text",
    "folder/b.jsonl": "JSON Lines",
    "folder/c.json.gz": "JSON array",
    "d.csv": "CSV in UTF-16",
    "e.bz2": "plain text without its byte-order mark",
    "photo.png": "binary",
    "empty.txt": "plain text",
}


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.mkdir("folder")
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def tarred(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def write(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize(
    "name, make",
    {
        "a.zip": lambda: zipped(MEMBERS),
        "stored.zip": lambda: zipped(MEMBERS, zipfile.ZIP_STORED),
        "lzma.zip": lambda: zipped(MEMBERS, zipfile.ZIP_LZMA),
        "unnamed": lambda: zipped(MEMBERS),
        "a.tar": lambda: tarred(MEMBERS),
        "gnu.tar": lambda: tarred(MEMBERS, tarfile.GNU_FORMAT),
        "old.tar": lambda: tarred(MEMBERS, tarfile.USTAR_FORMAT),
        "a.tar.gz": lambda: gzip.compress(tarred(MEMBERS)),
        "a.tgz": lambda: gzip.compress(tarred(MEMBERS)),
        "a.tar.bz2": lambda: bz2.compress(tarred(MEMBERS)),
    }.items(),
)
def test_members_are_read_as_files_are(
    tmp_path: Path, read: Read, name: str, make: Callable[[], bytes]
) -> None:
    path = write(tmp_path, name, make())
    for unit_bytes in (1, 10**9):
        documents, log = read(path, unit_bytes)
        assert documents == DOCUMENTS
        assert log.members == [(f"{name}/{member}", form) for member, form in TAKEN.items()]
        assert (log.skipped.binary_files, log.skipped.empty_documents) == (1, 1)


@pytest.mark.parametrize("name, pack", [("a.zip", zipped), ("a.tar", tarred)])
def test_patterns_choose_among_members(
    tmp_path: Path, read: Read, name: str, pack: Callable[..., bytes]
) -> None:
    path = write(tmp_path, name, pack(MEMBERS))
    assert read(path, include=("*.txt",))[0] == [b"plain text"]
    assert read(path, exclude=("folder", "*.csv"))[0] == [b"plain text", b"marked"]
    assert read(path, include=(f"{name}/folder/*",), as_text=("*.jsonl",))[0] == [
        MEMBERS["folder/b.jsonl"],
        b"item",
    ]


@pytest.mark.parametrize("name, pack", [("a.zip", zipped), ("a.tar", tarred)])
@pytest.mark.parametrize(
    "member", ["../x.txt", "/etc/x.txt", "a/../../x.txt", "..\\x.txt", "C:\\x.txt", "a/.."]
)
def test_members_that_lead_out_of_the_folder_are_refused(
    tmp_path: Path, read: Read, name: str, pack: Callable[..., bytes], member: str
) -> None:
    path = write(tmp_path, name, pack({"a.txt": b"good", member: b"bad"}))
    with pytest.raises(UserError, match=rf"in input .*{name} leads out of the archive's folder"):
        read(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_followed_nowhere(tmp_path: Path, read: Read, kind: bytes) -> None:
    def with_link(target: str) -> Path:
        stream = io.BytesIO(tarred({"d/a.txt": b"good"}))
        with tarfile.open(fileobj=stream, mode="a") as archive:
            info = tarfile.TarInfo("d/link.txt")
            info.type, info.linkname = kind, target
            archive.addfile(info)
            device = tarfile.TarInfo("d/pipe")
            device.type = tarfile.FIFOTYPE
            archive.addfile(device)
        return write(tmp_path, "a.tar", stream.getvalue())

    inside = "a.txt" if kind == tarfile.SYMTYPE else "d/a.txt"
    assert read(with_link(inside))[0] == [b"good"]
    for target in ("/etc/passwd", "../../x", "../.."):
        with pytest.raises(UserError, match=r"links to .* out of the archive's folder"):
            read(with_link(target))


def test_links_in_zip_archives_are_links_too(tmp_path: Path, read: Read) -> None:
    for target, good in (("a.txt", True), ("../x", False), ("/etc/passwd", False)):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("a.txt", "good")
            link = zipfile.ZipInfo("link")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, target)
        path = write(tmp_path, "a.zip", stream.getvalue())
        if good:
            assert read(path)[0] == [b"good"]
        else:
            with pytest.raises(UserError, match=r"link in .* links to .* out of"):
                read(path)


def test_encrypted_members_are_refused(tmp_path: Path, read: Read) -> None:
    data = bytearray(zipped({"a.txt": b"secret"}))
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # the flag in the last entry of the directory
    with pytest.raises(UserError, match=r"a\.txt in input .*a\.zip is encrypted; unpack"):
        read(write(tmp_path, "a.zip", bytes(data)))
    data[data.rindex(b"PK\x01\x02") + 8] &= 254
    data[data.rindex(b"PK\x01\x02") + 10] = 99
    with pytest.raises(UserError, match="compressed by method 99, which is not read here"):
        read(write(tmp_path, "a.zip", bytes(data)))


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_damage_is_named(tmp_path: Path, read: Read, name: str) -> None:
    members = {f"{number}.txt": os.urandom(3000).hex().encode() for number in range(5)}
    data = zipped(members) if name == "a.zip" else tarred(members)
    data = gzip.compress(data) if name.endswith(".gz") else data
    for damaged in (data[: len(data) // 2], data[:3000] + b"some noise" + data[3010:]):
        if name == "a.tar" and len(damaged) == len(data):
            continue  # tar has no checksum of contents
        with pytest.raises(UserError, match=rf"input .*{name}.* is damaged: .*leave it out$"):
            read(write(tmp_path, name, damaged))


def test_noise_between_the_members_of_a_tar_is_no_end(tmp_path: Path, read: Read) -> None:
    data = tarred({"a.txt": b"a" * 512, "b.txt": b"b" * 512})
    data = data[:1024] + b"\x01noise" + data[1030:]
    with pytest.raises(UserError, match=r"a\.tar is damaged"):
        read(write(tmp_path, "a.tar", data))


@pytest.mark.parametrize("inner, form", [("b.zip", "ZIP archive"), ("b.tar.gz", "tar archive")])
def test_archives_in_archives_are_refused(
    tmp_path: Path, read: Read, inner: str, form: str
) -> None:
    data = zipped({"a.txt": b"x"}) if inner == "b.zip" else gzip.compress(tarred({"a.txt": b"x"}))
    for name, pack in (("a.zip", zipped), ("a.tar", tarred)):
        path = write(tmp_path, name, pack({inner: data}))
        with pytest.raises(UserError, match=rf"{name}/{inner} looks like {form}: unpack the arch"):
            read(path)
        assert read(path, exclude=(inner,))[0] == []


def test_bombs_are_refused_member_by_member(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_SMALL", 1 << 16)
    bomb = {"a.txt": b"good", "bomb.txt": b" " * (4 << 20)}
    path = write(tmp_path, "a.zip", zipped(bomb))
    with pytest.raises(UserError, match=r"a\.zip/bomb\.txt unpacks to more than 200 times"):
        read(path)
    assert sum(map(len, read(path, max_expansion=2000.0)[0])) == 4 + (4 << 20)
    path = write(tmp_path, "a.tar.gz", gzip.compress(tarred(bomb)))
    with pytest.raises(UserError, match=r"a\.tar\.gz.* unpacks to more than 200 times"):
        read(path)
    path = write(tmp_path, "b.tar", tarred({"bomb.txt.gz": gzip.compress(bomb["bomb.txt"])}))
    with pytest.raises(UserError, match=r"b\.tar/bomb\.txt\.gz unpacks to more than 200 times"):
        read(path)


def test_a_bad_record_is_named_by_its_member(tmp_path: Path, read: Read) -> None:
    path = write(tmp_path, "a.zip", zipped({"x/b.jsonl": b'{"text": "a"}\n{"text": 5}\n'}))
    with pytest.raises(UserError, match=r"line 2 of .*a\.zip/x/b\.jsonl has a field 'text'"):
        read(path)
