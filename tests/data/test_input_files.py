"""The files below an input, and the refusal of other formats."""

import os
from pathlib import Path

import pytest

from mhc_lightning.data.input_files import count_formats, find_input_files
from mhc_lightning.data.text_files import TextFile
from mhc_lightning.errors import UserError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b/x.py", "a.txt", "b/c/y.md", ".git/config", "b/__pycache__/z.py", "b/.hidden"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "tree"


def names(files: list[TextFile]) -> list[str]:
    return [file.name for file in files]


def test_folders_are_read_recursively_in_a_fixed_order(tree: Path) -> None:
    assert names(find_input_files([tree])) == ["a.txt", "b/c/y.md", "b/x.py"]


def test_patterns_choose_files(tree: Path) -> None:
    assert names(find_input_files([tree], include=["*.py", "*.txt"])) == ["a.txt", "b/x.py"]
    assert names(find_input_files([tree], include=["b/*"])) == ["b/c/y.md", "b/x.py"]
    assert names(find_input_files([tree], exclude=["c"])) == ["a.txt", "b/x.py"]
    assert names(find_input_files([tree], exclude=["b/*.md", "a.*"])) == ["b/x.py"]
    assert names(find_input_files([tree], not_below=[tree / "b"])) == ["a.txt"]


def test_a_named_file_is_taken_though_hidden(tree: Path) -> None:
    assert names(find_input_files([tree / "b/.hidden", tree / "a.txt"])) == [".hidden", "a.txt"]


def test_missing_and_unreadable_inputs_are_named(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"absent does not exist"):
        find_input_files([tmp_path / "absent"])

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        find_input_files([tmp_path])


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no regular file; write its content"):
        find_input_files([tmp_path / "pipe"])
    assert find_input_files([tmp_path]) == []


def test_forms_are_counted_by_ending(tree: Path) -> None:
    (tree / "b/a.so").write_bytes(bytes(range(256)))
    (tree / "rows.JSONL.gz").write_bytes(b"")
    (tree / "README").touch()
    (tree / "more.tgz").write_bytes(b"")
    found = find_input_files([tree])
    assert count_formats((file.name, file.description) for file in found) == {
        "plain text": {".txt": 1, ".md": 1, ".py": 1, "no ending": 1, ".tgz": 1},
        "binary": {".so": 1},
        "JSON Lines": {".JSONL.gz": 1},
    }


def test_binary_files_are_left_out_of_folders_and_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(range(256)) * 9)
    assert [file.format for file in find_input_files([tmp_path])] == ["binary"]
    with pytest.raises(UserError, match=r"a\.png looks like binary\. Or leave it out"):
        find_input_files([tmp_path / "a.png"])
    (file,) = find_input_files([tmp_path / "a.png"], as_text=["*.png"])
    assert file.format == "plain text"


def test_one_line_names_a_file_of_each_form_and_how_to_go_on(tmp_path: Path) -> None:
    for name in ("a.csv", "b/c.csv", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("body\nhello\n")
    (tmp_path / "e.json").write_text('[{"body": "x"}]')
    with pytest.raises(UserError) as caught:
        find_input_files([tmp_path])
    message = str(caught.value)
    assert f"{tmp_path}/a.csv (and 1 more) looks like CSV with the columns 'body' and no" in message
    assert f"{tmp_path}/e.json looks like JSON array with the fields 'body'" in message
    assert "exclude=['*.csv','*.json']" in message and "as_text=['*.csv','*.json']" in message
    assert "\n" not in message and "d.txt" not in message
    assert len(find_input_files([tmp_path], exclude=["*.csv", "*.json"])) == 1
    as_text = find_input_files([tmp_path], as_text=["*.csv", "*.json"])
    assert {file.format for file in as_text} == {"plain text"} and len(as_text) == 4


def test_linked_folders_are_followed_and_every_folder_is_read_once(tree: Path) -> None:
    outside = tree.parent / "outside"
    outside.mkdir()
    (outside / "o.txt").write_text("outside")
    (tree / "a link").symlink_to(tree / "b", target_is_directory=True)  # sorts before b
    (tree / "b/out").symlink_to(outside, target_is_directory=True)
    (tree / "b/c/up").symlink_to("../..", target_is_directory=True)
    (outside / "back").symlink_to(tree, target_is_directory=True)
    (tree / "gone").symlink_to("nowhere")
    assert names(find_input_files([tree])) == ["a.txt", "b/c/y.md", "b/out/o.txt", "b/x.py"]
    assert names(find_input_files([tree], exclude=["out"])) == ["a.txt", "b/c/y.md", "b/x.py"]
    assert names(find_input_files([tree], not_below=[outside])) == ["a.txt", "b/c/y.md", "b/x.py"]


def test_a_file_may_come_from_one_input_only(tree: Path) -> None:
    for inputs in ([tree, tree / "b/x.py"], [tree / "a.txt"] * 2, [tree / "b", tree]):
        with pytest.raises(UserError, match=r"comes twice, from input .* and .*; give it once"):
            find_input_files(inputs)
