"""A sweep's bookkeeping, with a stand-in for `fit` that notes how it is called."""

import json
import sys
from types import SimpleNamespace

import pytest
import sweep
from sweep import Run

FIT = """
import os, sys, pathlib, time
words = dict(word.partition("=")[::2] for word in sys.argv[2:])
own = pathlib.Path(words["output_dir"])
(own / "checkpoints").mkdir(parents=True, exist_ok=True)
with open(own / "calls", "a") as file:
    print(" ".join(sys.argv[1:]), file=file)
if "meets" in words:  # wait for another run to be under way
    (own.parent / f"{own.name} is here").touch()
    until = time.monotonic() + 60
    while not (own.parent / f"{words['meets']} is here").exists() and time.monotonic() < until:
        time.sleep(0.01)
    print(os.environ["OMP_NUM_THREADS"], time.monotonic() < until)
if words.get("saves") == "true":
    (own / "checkpoints" / "last").touch()
code = own / "exit_code"
sys.exit(int(code.read_text()) if code.exists() else 0)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    script = tmp_path / "fit.py"
    script.write_text(FIT)
    monkeypatch.setattr(sweep, "command", lambda *words: [sys.executable, str(script), *words])
    return tmp_path / "runs"


def calls(folder, name):
    return (folder / name / "calls").read_text().splitlines()


def exits_with(folder, name, code):
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "exit_code").write_text(str(code))


def test_what_has_ended_is_skipped_and_what_was_stopped_goes_on(folder):
    runs = [Run("a", "x.yaml", ("lr=1", "saves=true")), Run("b", "x.yaml", ("lr=2", "saves=true"))]
    exits_with(folder, "b", 143)
    with pytest.raises(SystemExit) as stopped:
        sweep.run_all(runs, folder)
    assert stopped.value.code == 143
    exits_with(folder, "b", 0)
    outcomes = sweep.run_all(runs, folder)
    assert [(name, outcome.diverged) for name, outcome in outcomes.items()] == [
        ("a", False),
        ("b", False),
    ]
    assert calls(folder, "a") == [f"fit --config x.yaml output_dir={folder}/a lr=1 saves=true"]
    begun, resumed = calls(folder, "b")
    assert begun.endswith("overwrite=true")  # the folder was there, with nothing saved in it
    assert resumed.endswith("ckpt_path=last")


def test_a_loss_that_stops_being_finite_is_a_result(folder):
    exits_with(folder, "a", 3)
    assert sweep.run_all([Run("a", "x.yaml")], folder)["a"].diverged
    assert sweep.run_all([Run("a", "x.yaml")], folder)["a"].diverged
    assert len(calls(folder, "a")) == 1
    assert json.loads((folder / "a" / sweep.RECORD).read_text())["exit_code"] == 3


def test_a_folder_with_other_settings_is_not_taken_for_the_run(folder):
    sweep.run_all([Run("a", "x.yaml", ("lr=1",))], folder)
    with pytest.raises(SystemExit, match=r"^error: .*lr=1.*output=FOLDER"):
        sweep.run_all([Run("a", "x.yaml", ("lr=2",))], folder)


def test_runs_side_by_side(folder, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep.os, "cpu_count", lambda: 6)
    folder.mkdir()
    runs = [Run("a", "c", ("meets=b",)), Run("b", "c", ("meets=a",)), Run("c", "c", ("meets=c",))]
    exits_with(folder, "b", 3)
    outcomes = sweep.run_all(runs, folder, jobs=2)
    assert [outcome.diverged for outcome in outcomes.values()] == [False, True, False]
    for name in "abc":  # each with its half of the cores, and none alone but the last
        assert (folder / "output" / f"{name}.txt").read_text() == "3 True\n"


def test_after_a_failure_no_run_is_begun(folder):
    names = "abcdef"
    for name in names:
        exits_with(folder, name, 2)
    with pytest.raises(SystemExit) as failed:
        sweep.run_all([Run(name, "c") for name in names], folder, jobs=2)
    assert failed.value.code == 2
    begun = [name for name in names if (folder / name / "calls").exists()]
    assert len(begun) <= 3 and not (folder / "f" / "calls").exists()


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_jobs_run_and_are_waited_for(folder, cluster):
    pytest.importorskip("submitit")
    slurm = {"cluster": cluster, "timeout_min": 2}
    runs = [Run("a", "c", ("x=1",)), Run("b", "c")]
    exits_with(folder, "b", 3)
    outcomes = sweep.run_all(runs, folder, slurm)
    assert [outcome.diverged for outcome in outcomes.values()] == [False, True]
    assert calls(folder, "a") == [f"fit --config c output_dir={folder}/a x=1"]
    assert len(list((folder / "slurm").glob("*_0_log.out"))) == 2

    assert sweep.run_all(runs, folder, slurm) == outcomes
    assert len(calls(folder, "a")) == len(calls(folder, "b")) == 1


def test_a_job_that_fails_ends_the_sweep(folder, capsys, monkeypatch):
    pytest.importorskip("submitit")
    slurm = {"cluster": "local", "timeout_min": 2}

    def exit_code_of(run):
        with pytest.raises(SystemExit) as failed:
            sweep.run_all([run], folder, slurm)
        assert f"error: the run in {folder / run.name} failed" in capsys.readouterr().err
        assert sweep.recorded(run, folder) is None
        return failed.value.code

    exits_with(folder, "a", 2)
    assert exit_code_of(Run("a", "c")) == 2
    monkeypatch.setattr(sweep, "command", lambda *words: ["no such program"])  # the job itself
    assert exit_code_of(Run("b", "c")) == 1


def test_settings_of_slurm_that_are_no_good_are_one_line(folder):
    pytest.importorskip("submitit")
    for wrong in ({"cluster": "cloud"}, {"timeout_min": "long"}, {"partitoin": "gpu"}):
        with pytest.raises(SystemExit, match=r"^error: slurm: .+$"):
            sweep.run_all([Run("a", "c")], folder, {"cluster": "local", **wrong})


def test_without_submitit_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit, match=r"pip install 'mhc-lightning\[slurm\]'"):
        sweep.run_all([Run("a", "c")], folder, {"partition": "gpu"})


def test_jobs_of_slurm_have_a_task_for_each_gpu(folder, monkeypatch):
    made = []

    class Executor:
        def __init__(self, folder, cluster):
            self.cluster, self.jobs = cluster or "slurm", 0
            made.append(self)

        def update_parameters(self, **parameters):
            self.parameters = parameters

        def submit(self, call, *arguments):
            self.jobs += 1
            return SimpleNamespace(results=lambda: [call(*arguments), 1])

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor))
    read = ["slurm.partition=gpu", "slurm.timeout_min=90", "slurm.gpus_per_node=4", "x=1"]
    words = sweep.read_words(read, {"size": "cpu"})
    assert words.overrides == ("x=1",) and words.settings == {"size": "cpu"}
    outcomes = sweep.run_all([Run("a", "c"), Run("b", "c")], folder, words.slurm)
    assert set(outcomes) == {"a", "b"}
    (executor,) = made
    assert executor.jobs == 2
    assert executor.parameters == {
        "slurm_partition": "gpu",
        "timeout_min": 90,
        "gpus_per_node": 4,
        "tasks_per_node": 4,
    }


def test_words_of_a_recipe():
    words = sweep.read_words(["size=gpu", "optimizer.lr=1e-3"], {"size": "cpu", "only": ""})
    assert words.settings == {"size": "gpu", "only": ""}
    assert words.slurm is None and words.overrides == ("optimizer.lr=1e-3",)
    assert words.jobs == 1 and sweep.read_words(["jobs=3"], {}).jobs == 3
    for wrong in ("0", "two", "-1"):
        with pytest.raises(SystemExit, match=f"error: jobs={wrong} is not a number of runs"):
            sweep.read_words([f"jobs={wrong}"], {})
    assert sweep.chosen("only", "", "ab") == ["a", "b"]
    with pytest.raises(SystemExit, match="only=c is not known; choose from a, b"):
        sweep.chosen("only", "a,c", "ab")
