"""The pipeline in two and four processes against one process, and what is refused without any."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch

from mhc_lightning import LanguageModel
from mhc_lightning.errors import UserError
from mhc_lightning.optimizers.recipes import AdamWRecipe
from mhc_lightning.strategies import PipelineStrategy

SCRIPT = Path(__file__).with_name("pipeline_in_processes.py")


def case(schedule: str, devices: int, **changes: Any) -> dict[str, Any]:
    layout = {"schedule": schedule, "overlap": True, **changes.pop("strategy", {})}
    return {"devices": devices, "experts": True, **changes, "strategy": layout}


class Launched(NamedTuple):
    """How a launch ended; ``left_behind`` are the processes of it that still run."""

    returncode: int
    stderr: str
    left_behind: list[int]


def launch(
    folder: Path,
    processes: int,
    cases: dict[str, dict[str, Any]],
    nodes: Sequence[Mapping[str, str]] = ({},),
) -> Launched:
    """Run all cases in one launch of so many processes, on nodes with these environments."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT)]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "stderr").open("w") as stderr:
        started = [
            subprocess.Popen(
                [*command, json.dumps(cases), str(folder)],
                env={**shared, **node},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            for node in nodes
        ]
    try:
        for process in started:
            process.wait(timeout=400)
        left, until = members_of(started), time.monotonic() + 20
        while left and time.monotonic() < until:
            time.sleep(0.2)
            left = members_of(started)
    finally:
        for member in members_of(started):
            os.kill(member, signal.SIGKILL)
    worst = max(process.returncode for process in started)
    return Launched(worst, (folder / "stderr").read_text(), left)


def members_of(leaders: list[subprocess.Popen[bytes]]) -> list[int]:
    """The running processes of some sessions."""
    found, sessions = [], {leader.pid for leader in leaders}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = status.read_text().rpartition(")")[2].split()[:4]
            if int(of) in sessions and state != "Z":
                found.append(int(status.parent.name))
    return found


def train(
    folder: Path,
    processes: int,
    cases: dict[str, dict[str, Any]],
    nodes: Sequence[Mapping[str, str]] = ({},),
) -> dict[str, Any]:
    """What the processes saw in each case."""
    result = launch(folder, processes, cases, nodes)
    assert result.returncode == 0, result.stderr[-5000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in cases}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases: dict[str, dict[str, Any]] = {
        "experts": {"experts": True},
        "padded": {"padded": True, "experts": True},
        "single_pass": {"single_pass": True},
        "watched": {"watched": True},
        "bf16-mixed": {"experts": True, "precision": "bf16-mixed"},
        "bf16-true": {"experts": True, "precision": "bf16-true"},
    }
    return train(tmp_path_factory.mktemp("single"), 1, cases)


def assert_same_training(ours: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """Losses, norms and loads of five steps, the first step's gradients, the final parameters."""
    assert len(ours["rows"]) == 5 and "val/loss" in expected["rows"][1]
    assert expected["rows"][0]["train/grad_norm"] > 1, "gradients must be clipped"
    for row, wanted in zip(ours["rows"], expected["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-6), name
    for part in ("gradients", "state"):
        assert sorted(ours[part]) == sorted(expected[part]), name
        for key, wanted in expected[part].items():
            difference = torch.linalg.vector_norm(ours[part][key] - wanted)
            assert difference <= 1e-6 * torch.linalg.vector_norm(wanted), (name, part, key)
    assert list(ours["state"]) == list(expected["state"])


@pytest.mark.slow
def test_every_schedule_trains_as_one_process_does(single: Any, tmp_path: Path) -> None:
    """With experts, accumulation over two batches, clipping and validation; from meta or built.

    Also with sequences that are padded, so that micro-batches weigh unlike; with recomputation, and
    with instruments, which see the same tokens where there is but one micro-batch; and in bfloat16,
    which plain torch rounds the same where there is.
    """
    cases = {
        "gpipe": case("gpipe", 2, strategy={"microbatches": 2}),
        "1f1b": case("1f1b", 2, meta=True, strategy={"blocks_per_stage": [3, 5]}),
        "interleaved_1f1b": case("interleaved_1f1b", 2, recompute="auto"),
        "zbv": case("zbv", 2),
        "dualpipev": case("dualpipev", 2, recompute=3),
        "padded": case("dualpipev", 2, padded=True),
        "single_pass": case("zbv", 2, experts=False, single_pass=True),
        "watched": case("zbv", 2, experts=False, watched=True, strategy={"microbatches": 1}),
        "bf16-mixed": case("gpipe", 2, precision="bf16-mixed", strategy={"microbatches": 1}),
        "bf16-true": case("zbv", 2, precision="bf16-true", strategy={"microbatches": 1}),
    }
    for name, ours in train(tmp_path, 2, cases).items():
        assert_same_training(ours, single[name if name in single else "experts"], name)
    assert "amax_gain/composite/backward/layer_15" in single["watched"]["rows"][0]


@pytest.mark.slow
def test_sharded_stages_and_long_pipelines_train_as_one_process_does(
    single: Any, tmp_path: Path
) -> None:
    two = {"pipeline_size": 2}
    cases = {
        "1f1b, sharded": case("1f1b", 4, meta=True, strategy=two),
        "interleaved_1f1b, sharded": case("interleaved_1f1b", 4, strategy=two),
        "zbv, sharded": case("zbv", 4, recompute=3, strategy=two),
        "dualpipev, sharded": case("dualpipev", 4, strategy=two),
        "zbv, long": case("zbv", 4),
    }
    for name, ours in train(tmp_path, 4, cases).items():
        assert_same_training(ours, single["experts"], name)


@pytest.mark.slow
def test_several_nodes_under_slurm_train_as_one_process_does(single: Any, tmp_path: Path) -> None:
    """Two tasks on two nodes, which are told apart by what SLURM sets alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    job = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "2", "NNODES": "2", "NTASKS_PER_NODE": "1"}
    nodes = [
        {f"SLURM_{name}": value for name, value in {**job, **place}.items()} | meeting
        for place in (
            {"PROCID": str(n), "LOCALID": "0", "NODEID": str(n), "NODELIST": "127.0.0.1"}
            for n in range(2)
        )
    ]
    cases = {"slurm": case("interleaved_1f1b", 1, nodes=2)}
    assert_same_training(train(tmp_path, 1, cases, nodes)["slurm"], single["experts"], "slurm")


@pytest.mark.slow
def test_paired_stages_may_overlap_and_results_stay_bit_for_bit_equal(tmp_path: Path) -> None:
    """On streams that only keep account: what has to wait for what, and what has not to.

    The first step has as many pairs as the schedule says; the halves of none wait for each other,
    and each half's result is sent before the other is done.
    """
    cases = {
        "plain": case("dualpipev", 2, recompute=3, strategy={"overlap": False}),
        "recorded": case("dualpipev", 2, recompute=3, watched=True, recorded=True),
    }
    plain, ours = train(tmp_path, 2, cases).values()
    for group in ("gradients", "state"):
        for key, wanted in plain[group].items():
            assert torch.equal(ours[group][key], wanted), (group, key)
    assert [row["train/loss"] for row in ours["rows"]] == [r["train/loss"] for r in plain["rows"]]

    for rank, record in enumerate(ours["records"]):
        pairs, operations = record["pairs"], record["operations"]
        assert len(pairs) == 11, "of 16 forward passes of a device"
        first: dict[tuple[str, int, int], int] = {}
        for index, operation in enumerate(operations):
            first.setdefault(operation[:3], index)

        def at(kind: str, stage: int, part: int) -> Any:
            return operations[first[kind, stage, part]]  # noqa: B023

        def next_on(stream: int, operation: Any) -> Any:
            later = operations[operations.index(operation) + 1 :]  # noqa: B023
            return next(o for o in later if o.stream == stream)

        merging = {o.stream for o in operations if o.kind == "merge"}
        computing = {o.stream for o in operations if o.kind != "merge"}
        assert len(computing) == 2 and merging.isdisjoint(computing)
        for (stage, part), (other, earlier) in pairs:
            forward, backward = at("forward", stage, part), at("backward", other, earlier)
            assert not forward.follows(backward) and not backward.follows(forward)
            if stage in (0, 2):  # stage 1 hands on to this device, and stage 3 is the last
                merge, send = (
                    operations[first[forward[:3]] + 1],
                    next_on(forward.stream, forward),
                )
                assert (merge.kind, send.kind) == ("merge", "send")
                assert merge.follows(forward) and send.follows(merge)
                assert not send.follows(backward)
            if other in (1, 3):
                send = next_on(backward.stream, backward)
                assert send.kind == "send" and not send.follows(forward)
        for kind, stage, part in first:
            if kind in ("backward", "weights"):
                assert at(kind, stage, part).follows(at("forward", stage, part))
        if rank == 1:  # what a device hands to itself
            for part in range(8):
                assert at("forward", 2, part).follows(at("forward", 1, part))
                assert at("backward", 1, part).follows(at("backward", 2, part))
        assert record["ends"]
        for count, behind in record["ends"]:
            assert all(behind.get(o.stream, 0) >= o.number for o in operations[:count])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "cause"),
    [
        ("raise", 1, "failed at step 3, between steps: ArithmeticError: out of luck"),
        ("raise", 0, "failed at step 3, between steps: ArithmeticError: out of luck"),
        ("SIGKILL", 1, "was killed by signal 9 (SIGKILL: often the kernel, when memory runs out)"),
        ("SIGKILL", 0, "is gone at step "),
        ("SIGSTOP", 1, "gives no sign of life at step "),
        ("hang", 1, "hangs at step 3, forward of micro-batch 0 in stage 1 (pipeline_in_processes"),
    ],
)
def test_the_cause_of_a_fault_is_named_by_the_survivors(
    fault: str, rank: int, cause: str, tmp_path: Path
) -> None:
    """The run ends by itself, in far less than the time that processes wait for each other.

    Lightning starts rank 1 from rank 0, which holds the store. Nothing of the run is left, not even
    what was stopped.
    """
    layout = {"timeout_seconds": 10.0 if fault in ("SIGSTOP", "hang") else 1800.0}
    faulty = case("zbv", 2, fault=(fault, rank), strategy=layout)
    result = launch(tmp_path, 1, {"fault": faulty})
    assert result.returncode != 0
    assert result.left_behind == []
    name = f"rank {rank} (pipeline stage {'1, 2' if rank else '0, 3'})"
    assert f"error: {name} {cause}" in result.stderr
    assert result.stderr.count("error: ") == 1, "the processes share a standard error"
    if fault == "hang":  # it shows where
        assert "in oversleep" in result.stderr and "Thread 0x" in result.stderr


def test_what_cannot_run_is_refused_without_processes(tiny_transformer) -> None:
    def refusal(precision: Any = "32-true", compile: bool = False, batch: int = 4, **changes: Any):
        strategy = PipelineStrategy(**changes)
        pl.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, precision=precision, logger=False
        )
        model = LanguageModel(tiny_transformer(), AdamWRecipe(lr=1.0), compile=compile)
        with pytest.raises(UserError) as caught:
            strategy.check(model, batch)
        assert not torch.distributed.is_initialized()
        return str(caught.value)

    with pytest.raises(UserError, match="one of gpipe"):
        PipelineStrategy("chimera")
    with pytest.raises(UserError, match="above 0"):
        PipelineStrategy(timeout_seconds=0)
    assert "makes 4 stages" in refusal(schedule="zbv")
    assert "bf16-mixed" in refusal(precision="16-true")
    assert "at least 2 micro-batches" in refusal(microbatches=1)
    assert "divisor of 4" in refusal(microbatches=3)
    assert "divisor of 2" in refusal(pipeline_size=3)
    tiny = tiny_transformer
    tiny_transformer = lambda: tiny(num_layers=4)  # noqa: E731
    assert "compile=false" in refusal(schedule="dualpipev", compile=True)


def test_a_module_without_stages_is_refused() -> None:
    strategy = PipelineStrategy()
    pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    with pytest.raises(UserError, match="PipelinedNetwork"):
        strategy.check(pl.LightningModule())
