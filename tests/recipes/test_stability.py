"""The recipe stability: every connection in the same run."""

from pathlib import Path

import library_text
import pytest
import sweep

import stability
from mhc_lightning.cli.arguments import parse_arguments
from mhc_lightning.cli.composition import compose_experiment


@pytest.mark.parametrize("size", ["cpu", "gpu", "paper"])
def test_every_connection_gets_the_same_run(size):
    runs = stability.runs_of(size, "", ("seed=3",))
    assert runs[0].name == stability.BASELINE and {"hc", "mhc"} <= {run.name for run in runs}
    found, connections = [], set()
    for run in runs:
        words = ["fit", "--config", run.config, *run.overrides]
        values = compose_experiment(parse_arguments(words)).values()
        connections.add(str(values.pop("connection")))
        for section in (values["model"], values["logger"], values["checkpoint"]):
            section.pop("connection", None)
        assert values["seed"] == 3 and values["model"]["num_layers"] >= 24
        for key in ("output_dir", "logger", "checkpoint"):
            values.pop(key)
        found.append(values)
    assert all(values == found[0] for values in found)
    assert len(connections) == len(runs)


def test_an_unknown_size_or_connection_is_one_line():
    for size, only in (("huge", ""), ("cpu", "mch"), ("paper", "krom")):
        with pytest.raises(SystemExit, match="is not known; choose from"):
            stability.runs_of(size, only, ())


def test_the_page_is_on_all_runs_beside_the_residual_one(tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.chdir(tmp_path)
    for module in (stability, library_text):
        monkeypatch.setattr(module, "run", lambda *words: commands.append(words))
    diverged = {"krom"}  # before they logged anything

    def run_all(runs, folder, slurm, jobs):
        outcomes = {run.name: sweep.Outcome(folder / run.name, False) for run in runs}
        for name in outcomes.keys() - diverged:
            outcomes[name].folder.mkdir(parents=True, exist_ok=True)
            (outcomes[name].folder / "metrics.csv").touch()
        return outcomes

    monkeypatch.setattr(stability, "run_all", run_all)
    stability.main(["only=hc,residual", "output=here"])
    prepare, report = commands
    stability.main(["only=hc,krom,mhc", "output=here"])
    assert "krom: diverged before it logged anything" in capsys.readouterr().err
    assert commands[-2] == ("report", "here/hc", "here/mhc", "output=here/report")
    assert commands[-1][1:] == (
        *("here/mhc", "here/hc", "baseline=here/mhc"),
        "output=here/report_hc_minus_mhc",
    )
    assert prepare[0] == "prepare" and "output=data/python" in prepare
    folders = [str(Path("here") / name) for name in ("hc", "residual")]
    assert report == ("report", *folders, "baseline=here/residual", "output=here/report")
