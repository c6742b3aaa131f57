"""A prepared folder, a finished run, and the command line, in this process or in its own."""

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
from itertools import count

import pytest
from in_process import run_main

# Everything a run has, in a few seconds.
SMALL = """
model.dim=16 model.num_layers=2 model.num_heads=2 model.head_dim=8 model.rope_dim=4 model.kv_rank=8
model.ffn_dim=24 data.batch_size=4 data.micro_batch_size=2 data.sequence_length=32
data.num_workers=0 data.validation_sequences=4 trainer.accelerator=cpu trainer.max_steps=6
trainer.val_check_interval=3 trainer.log_every_n_steps=1 checkpoint.every_n_steps=2
optimizer.warmup_steps=2
""".split()  # noqa: SIM905
WORDS = "stream residual hyper connection manifold sinkhorn gain layer token the of and"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A prepared folder of some 3,000 training tokens: a pass over them takes 24 small steps."""
    from mhc_lightning.data import prepare

    folder = tmp_path_factory.mktemp("data dir = 1, {x}")
    generator = random.Random(5)
    (folder / "text").mkdir()
    for number in range(12):
        text = " ".join(generator.choice(WORDS.split()) for _ in range(50))
        (folder / "text" / f"{number}.txt").write_text(text)
    prepare(folder / "text", folder / "tokens", validation_fraction=0.25, num_workers=1,
            progress=False)  # fmt: skip
    return folder / "tokens"


# Where processes of a run meet. Lightning looks for a free port and lets it go again, and another
# run may take it: each run gets one of its own, below those that systems give away.
_PORTS = count(20_000 + 2_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))
TIMINGS = ("train/tokens_per_second", "train/mfu", "train/peak_memory_bytes")


class Command:
    """Runs the real command in a folder."""

    def __init__(self, folder, data):
        self.folder = folder
        self.data = data
        self.env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.processes = []

    def words(self, command, *words, config="mhc_quickstart"):
        data = [] if self.data is None else [f"data.path={self.data}"]
        return [command, "--config", str(config), *SMALL, *data, *words]

    def run(self, command, *words, code=0, **options):
        """Run in this process; the exit code must be `code`. Gives (stdout, stderr)."""
        return run_main(*self.words(command, *words, **options), folder=self.folder, code=code)

    def inside(self, command, *words, **options):
        """Run in this process, which has imported everything; gives the exit code."""
        from mhc_lightning.cli.main import main

        handler = signal.getsignal(signal.SIGTERM)
        try:
            with contextlib.chdir(self.folder):
                return main(self.words(command, *words, **options))
        finally:
            signal.signal(signal.SIGTERM, handler)

    def start(self, command, *words, preexec=None, **options):
        process = subprocess.Popen(
            [sys.executable, "-m", "mhc_lightning", *self.words(command, *words, **options)],
            preexec_fn=preexec,
            cwd=self.folder,
            env={**self.env, "MASTER_PORT": str(next(_PORTS))},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def close(self):
        """End what is still running."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def __call__(self, command, *words, code=0, **options):
        """As `run`, in a process of its own."""
        process = self.start(command, *words, **options)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == code, f"exit code {process.returncode}\n{output}\n{errors}"
        return output, errors

    def metrics(self, name="run"):
        """Step -> tag -> text as written, without what depends on the machine."""
        with open(self.folder / name / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        steps = [int(row.pop("step")) for row in rows]
        assert steps == sorted(set(steps)), "a step is repeated or out of order"
        kept = [{t: v for t, v in row.items() if v != "" and t not in TIMINGS} for row in rows]
        return dict(zip(steps, kept, strict=True))

    def points(self, tag, name="run"):
        """[(step, value)] of a tag, from all event files, as any reader sees them."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / name), size_guidance={"scalars": 0})
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture(scope="session")
def command_in(prepared):
    """Gives a command for a folder, for fixtures that several tests share."""
    return lambda folder: Command(folder, prepared)


@pytest.fixture
def command(tmp_path, command_in):
    command = command_in(tmp_path)
    yield command
    command.close()


@pytest.fixture(scope="session")
def trained(tmp_path_factory, prepared):
    """A command in whose folder there is a finished run, to be read only."""
    command = Command(tmp_path_factory.mktemp("trained"), prepared)
    command.run("fit", "output_dir=run", "callbacks=minimal", "checkpoint.keep_best=1")
    return command


# Long enough to be stopped; a pass over the data takes 24 steps.
LONG = [
    "trainer.max_steps=40",
    "trainer.val_check_interval=10",
    "checkpoint.every_n_steps=10",
    "data.num_workers=2",
    "callbacks=minimal",
]


@pytest.fixture(scope="session")
def long_run():
    """Settings of a run that can be stopped."""
    return LONG


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, prepared):
    """Metrics of a run with these settings that nothing stopped."""
    command = Command(tmp_path_factory.mktemp("uninterrupted"), prepared)
    command.run("fit", "output_dir=run", *LONG)
    return command.metrics()
