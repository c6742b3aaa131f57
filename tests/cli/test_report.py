"""The command `report`: pages, JSON, mistakes, and no torch."""

import contextlib
import json
import shutil
import subprocess
import sys

import pytest

from mhc_lightning.cli.main import main


def report(folder, *words):
    with contextlib.chdir(folder):
        return main(["report", *words])


def test_a_run_is_reported_as_json_and_nothing_else(trained, capfd, tmp_path):
    assert report(tmp_path, str(trained.folder / "run"), "output=a page", "--json") == 0
    output, errors = capfd.readouterr()
    record = json.loads(output)
    assert errors == "" and record["page"] == "a page/index.html"
    assert (tmp_path / "a page/index.html").is_file()
    beside = json.loads((tmp_path / "a page/report.json").read_text())
    assert {"page": record["page"], **beside} == record
    (run,) = record["runs"]
    rows = trained.metrics()
    assert run["ending"]["state"] == "complete" and run["last_step"] == 6
    last = [float(rows[step]["train/loss"]) for step in (4, 5, 6)]
    assert run["loss"]["value"] == pytest.approx(sum(last) / 3) and run["loss"]["low"] is None
    assert run["validation_loss"] == {"step": 6, "value": float(rows[6]["val/loss"])}
    assert run["verdict"]["state"] == "finite" and run["gains"] == {}
    assert run["what_was_run"]["Steps"] == "6" and run["what_was_run"]["Device"]
    assert run["peak_memory_bytes"] is None and run["gap"] is None
    (command,) = run["commands"]
    assert command.startswith("python -m mhc_lightning fit --config mhc_quickstart model.dim=16")
    assert command.endswith("output_dir=run_again")


def test_a_run_that_went_on_keeps_how_it_began_and_what_it_is(command, capfd):
    settings = ("output_dir=run", "trainer.log_every_n_steps=1")
    assert command.inside("fit", *settings, "trainer.max_steps=1", "overwrite=true") == 0
    assert command.inside("fit", *settings, "trainer.max_steps=2", "ckpt_path=last") == 0
    shutil.copytree(command.folder / "run", command.folder / "more/copy")
    environment = json.loads((command.folder / "run/environment.json").read_text())
    (first,) = environment["earlier"]
    assert "earlier" not in first
    assert first["ended"] == {**first["ended"], "reason": "complete", "step": 1}
    assert environment["ended"]["step"] == 2 and not environment["ended"]["non_finite"]
    assert environment["processes"] == 1
    assert environment["parameters"]["total"] > 1000
    (content,) = environment["data"]["content"]
    assert len(content) >= 32
    capfd.readouterr()
    assert report(command.folder, "run", "more", "baseline=run", "--json") == 0
    record = json.loads(capfd.readouterr()[0])
    assert record["baseline"] == "run"
    run, copy = record["runs"]
    assert len(run["commands"]) == 2
    assert "overwrite" not in run["commands"][0] and "ckpt_path" not in run["commands"][0]
    assert "trainer.max_steps=2 ckpt_path=last" in run["commands"][1]
    assert run["peak_memory_bytes"] > 10_000_000
    assert run["gains"]["amax_gain/composite/forward"]["largest"]["value"] == pytest.approx(1)
    assert run["verdict"]["state"] == "steady"
    page = (command.folder / "report/index.html").read_text()
    assert page.count('alt="Heat map of the residual matrix') == 12
    assert copy["gap"]["same_batches"] and copy["gap"]["loss"]["value"] == 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "report needs the folders of runs"),
        (["nowhere"], "nowhere is not there"),
        (["basline=run"], "basline=run is not there"),
        (["--config", "mhc_quickstart", "run"], "takes no --config"),
        (["run", "baseline=other"], "baseline=other is not among the runs"),
        (["run", "output=run/metrics.csv"], "cannot be written to"),
    ],
)
def test_mistakes_end_with_one_line(trained, capfd, words, message):
    assert report(trained.folder, *words) == 2
    output, errors = capfd.readouterr()
    (line,) = errors.splitlines()
    assert output == "" and line.startswith("error: ") and message in line


def test_the_report_comes_without_torch(trained, tmp_path):
    code = (
        "import sys\n"
        "from mhc_lightning.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'lightning', 'litdata'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    words = ["report", str(trained.folder / "run"), f"output={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"wrote {tmp_path}/index.html"
