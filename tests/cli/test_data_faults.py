"""Damaged data and inputs in another form, by the real commands."""

import shutil
import zipfile

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


@pytest.mark.parametrize(
    "name, message",
    {
        "cut.parquet": "cut.parquet is a damaged Parquet file",
        "out.zip": "../x.txt in input out.zip leads out of the archive's folder",
        "ragged.csv": "row 2 of ragged.csv has 3 fields, and the first row names 2",
        "numbers.json": "item 2 of numbers.json has a field 'text' that is int, not text",
    }.items(),
)
def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path, capsys, name, message):
    write_bad_inputs(tmp_path)
    assert command.inside("prepare", f"input={name}", "output=out", "prepare.num_workers=1") == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


def write_bad_inputs(folder):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["some words"] * 99}), folder / "cut.parquet"
    )
    (folder / "cut.parquet").write_bytes((folder / "cut.parquet").read_bytes()[:-99])
    with zipfile.ZipFile(folder / "out.zip", "w") as archive:
        archive.writestr("../x.txt", "out of the folder")
    (folder / "ragged.csv").write_text("text,b\nsome words,2\n1,2,3\n")
    (folder / "numbers.json").write_text('[{"text": "some words"}, {"text": 5}]')


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
