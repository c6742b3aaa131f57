"""A run that torchrun starts again after a process was killed."""

import os
import subprocess
import sys

import pytest

FAILING = '''
import os, signal
from lightning.pytorch import Callback

class FailOnce(Callback):
    """Kills rank 1 in the fourth step of the first start."""

    def on_train_batch_start(self, trainer, *_):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if first and (trainer.global_rank, trainer.global_step) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
'''


def test_auto_begins_a_run_and_goes_on_with_it(command) -> None:
    words = ("fit", "output_dir=run", "callbacks=minimal", "ckpt_path=auto")
    _, errors = command.run(*words, "trainer.max_steps=4")
    assert "starting over" not in errors and list(command.metrics()) == [1, 2, 3, 4]
    _, errors = command.run(*words)
    assert "going on from step 4" in errors
    assert list(command.metrics()) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_killed_process_costs_no_step(command) -> None:
    (command.folder / "failing.py").write_text(FAILING)
    words = ["strategy=ddp", "trainer.devices=2", "callbacks=minimal"]
    command("fit", *words, "output_dir=straight")
    command.env["PYTHONPATH"] = os.pathsep.join([str(command.folder), *sys.path])
    # Else torch 2.13 keeps the addresses of ended processes in a store that outlives them.
    command.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    failing = ["+callbacks.failing={_target_: failing.FailOnce}", "ckpt_path=auto"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", "--max-restarts=1", "-m", "mhc_lightning"),
            *command.words("fit", *words, "output_dir=run", *failing),
        ],
        cwd=command.folder, env=command.env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step 2" in done.stderr and "error: rank 1" in done.stderr
    found, straight = command.metrics(), command.metrics("straight")
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found == straight
