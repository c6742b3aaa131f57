"""A sweep's bookkeeping, with a stand-in for `fit` that notes how it is called."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import recipe_words
import sweep
from sweep import Run

FIT = """
import os, pathlib, signal, sys, time
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
if words.get("lasts") == "true":  # until it is told to save and end
    def save(*_):
        (own / "saved").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    (own / "lasts").touch()
    time.sleep(60)
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


def test_what_was_begun_with_other_settings_does_not_go_on(folder):
    exits_with(folder, "a", 143)
    with pytest.raises(SystemExit):
        sweep.run_all([Run("a", "x.yaml", ("lr=1", "saves=true"))], folder)
    with pytest.raises(SystemExit, match=r"^error: .*lr=1.*output=FOLDER"):
        sweep.run_all([Run("a", "x.yaml", ("lr=2", "saves=true"))], folder)


def test_what_left_nothing_may_be_begun_with_other_settings(folder):
    exits_with(folder, "a", 2)
    with pytest.raises(SystemExit):
        sweep.run_all([Run("a", "x.yaml", ("lr=fast",))], folder)
    exits_with(folder, "a", 0)
    assert not sweep.run_all([Run("a", "x.yaml", ("lr=1",))], folder)["a"].diverged


def test_a_run_named_twice_runs_once(folder):
    sweep.run_all([Run("a", "c"), Run("a", "c")], folder, jobs=2)
    assert len(calls(folder, "a")) == 1


SWEEP = """
import sys
sys.path.insert(0, {shared!r})
import sweep, pathlib
sweep.command = lambda *words: [sys.executable, {script!r}, *words]
runs = [sweep.Run(name, "c", ("lasts=true",)) for name in "ab"]
sweep.run_all(runs, pathlib.Path({folder!r}), jobs={jobs})
"""


def begin(folder, jobs):
    shared = str(Path(sweep.__file__).parent)
    code = SWEEP.format(
        shared=shared, script=str(folder.parent / "fit.py"), folder=str(folder), jobs=jobs
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_sweep_that_is_stopped_lets_its_runs_save(folder, jobs, number):
    process = begin(folder, jobs)
    names = "ab"[:jobs]
    until(lambda: all((folder / name / "lasts").exists() for name in names))
    os.killpg(process.pid, number)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert "stopped: the same command goes on" in errors
    assert all((folder / name / "saved").exists() for name in names)
    assert jobs == 2 or not (folder / "b").exists()


def test_a_second_call_waits_for_the_first_ones_run(folder):
    first = begin(folder, 1)
    until(lambda: (folder / "a" / "lasts").exists())
    second = begin(folder, 1)
    assert "waits for another call's" in second.stderr.readline()
    second.send_signal(signal.SIGINT)
    second.communicate(timeout=60)
    assert second.returncode == 130 and len(calls(folder, "a")) == 1
    first.terminate()
    first.communicate(timeout=60)


def test_each_of_several_runs_has_a_gpu_of_those_allowed(monkeypatch):
    def given(jobs):
        return [device.get("CUDA_VISIBLE_DEVICES") for device in sweep._own_devices(jobs)]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for count, expected in ((0, [None] * 3), (1, [None] * 3), (2, ["0", "1", "0"])):
        monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda count=count: count)
        assert given(3) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert given(2) == ["4", "5"]


def test_runs_side_by_side(folder, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda _: range(6), raising=False)
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


def test_without_slurm_nothing_is_submitted(folder, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.AutoExecutor, "which", lambda: "local")
    with pytest.raises(SystemExit, match=r"^error: there is no SLURM here"):
        sweep.run_all([Run("a", "c")], folder, {"partition": "gpu"})


def test_jobs_of_slurm_have_a_task_for_each_gpu(folder, monkeypatch):
    made = []

    class Executor:
        which = staticmethod(lambda: "slurm")

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
    words = recipe_words.read_words(read, {"size": "cpu"}, {})
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
