"""Files and folders that are written aside: complete under their name, or not there."""

import os
from pathlib import Path

import pytest

from mhc_lightning.files.atomic import replacing, write_text_atomically


def fill(path: Path, text: str) -> None:
    path.mkdir()
    (path / "inside").write_text(text)


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old" and aside.name.startswith(".aside-")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    fill(path, "old")
    fill(tmp_path / ".aside-folder", "half, left by a process that was killed")
    with replacing(path) as aside:
        fill(aside, "new")
        assert (path / "inside").read_text() == "old"
    assert (path / "inside").read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True])
def test_after_an_error_all_is_as_it_was(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "it"
    fill(path, "old") if folder else path.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(path) as aside:
        fill(aside, "half") if folder else aside.write_text("half")
        raise OSError("disk full")
    inside = path / "inside" if folder else path
    assert inside.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "folder", os.replace
    fill(path, "old")

    def refuse(source: Path, target: Path) -> None:
        if target == path and "replaced" not in source.name:
            raise OSError("refused")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="refused"), replacing(path) as aside:
        fill(aside, "new")
    assert (path / "inside").read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "file", "ü\r\nb")
    assert (tmp_path / "file").read_bytes() == "ü\r\nb".encode()
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
