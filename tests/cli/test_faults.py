"""Runs that lose a process: told in one line, under every strategy."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import pytest

FAULTY = '''
import os, signal, time
from lightning.pytorch import Callback
from mhc_lightning.errors import UserError

class Faulty(Callback):
    """Fails in rank 1: as it starts, or in the fourth step."""

    def __init__(self, what, at_start=False):
        self.what = what
        if at_start and os.environ.get("LOCAL_RANK") == "1":
            self.fail()

    def on_train_batch_start(self, trainer, *_):
        if (trainer.global_rank, trainer.global_step) == (1, 3):
            self.fail()

    def fail(self):
        if self.what == "mistake":
            raise UserError("that was wrong")
        if self.what == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), getattr(signal, self.what))
        time.sleep(5)
'''
KILLED = "was killed by signal 9 (SIGKILL: often the kernel, when memory runs out)"


def members_of(session: int) -> list[int]:
    """The running processes of a session."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = status.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(status.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "fault", "code", "line"),
    [
        ("auto", "what: SIGKILL", 4, f"error: rank 1 {KILLED} at step "),
        ("pipeline", "what: SIGKILL", 4, f"error: rank 1 (pipeline stage 1) {KILLED} at step "),
        ("ddp", "what: SIGKILL, at_start: true", 4, f"error: rank 1 {KILLED} before the processes"),
        ("fsdp", "what: mistake", 2, "error: rank 1, at step 4, between steps: that was wrong"),
        ("ddp", "what: hang", 4, "error: rank 1 hangs at step 4, between steps (faulty.py"),
    ],
)
def test_a_run_ends_with_one_line_and_leaves_no_process(
    command, strategy: str, fault: str, code: int, line: str
) -> None:
    (command.folder / "faulty.py").write_text(FAULTY)
    words = [f"strategy={strategy}", "trainer.devices=2", "callbacks=minimal", "output_dir=run",
             f"+callbacks.faulty={{_target_: faulty.Faulty, {fault}}}"]  # fmt: skip
    if "hang" in fault:
        words.append("strategy.timeout_seconds=10")
    command.env["PYTHONPATH"] = os.pathsep.join([str(command.folder), *sys.path])
    _, errors = command("fit", *words, code=code)
    assert line in errors
    assert errors.count("error: ") == 1 and "Traceback" not in errors
    until = time.monotonic() + 20  # one that is stuck is given some time
    while (left := members_of(command.processes[-1].pid)) and time.monotonic() < until:
        time.sleep(0.2)
    assert left == []
    if "at_start" not in fault and "hang" not in fault:
        end = json.loads((command.folder / "run/environment.json").read_text())["ended"]
        assert "rank 1" in end["reason"]
        assert (command.folder / "run/checkpoints/last").exists()
