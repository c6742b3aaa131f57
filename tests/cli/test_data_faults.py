"""Damaged data and inputs in another form, by the real commands."""

import shutil

import pytest


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_step_is_taken_on_a_damaged_chunk(command, prepared, tmp_path, capsys, workers):
    """A run that goes on over data damaged meanwhile ends, and its checkpoints stay."""
    command.data = shutil.copytree(prepared, tmp_path / "data")
    words = ("callbacks=minimal", "output_dir=run", f"data.num_workers={workers}")
    assert command.inside("fit", *words, "trainer.max_steps=4") == 0
    checkpoints = tmp_path / "run/checkpoints"
    before = {path.name: path.read_bytes() for path in checkpoints.iterdir()}
    (chunk,) = (command.data / "train").glob("*.bin")
    data = bytearray(chunk.read_bytes())
    data[-3] ^= 4
    chunk.write_bytes(data)
    capsys.readouterr()
    assert command.inside("fit", *words, "ckpt_path=last") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert errors == [
        f"error: chunk file {chunk} is damaged (checksum); copy it again, or delete"
        f" {command.data} and run `prepare` again"
    ]
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == before


def test_prepare_refuses_other_forms_in_one_line_and_takes_them_if_told(command, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("some words\n" * 50)
    (tmp_path / "in/b.csv").write_text("body\nsome words\n")
    words = ("input=in", "output=out", "prepare.num_workers=1")
    assert command.inside("prepare", *words) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert "in/b.csv looks like CSV with the columns 'body' and no 'text': " in error
    assert "as_text=['*.csv']" in error
    assert not (tmp_path / "out").exists()
    assert command.inside("prepare", *words, "as_text=['*.csv']") == 0
    assert "taken for plain text: 2 files (1 .csv, 1 .txt)" in capsys.readouterr().out
