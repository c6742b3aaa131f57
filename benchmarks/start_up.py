"""How long commands take to start, in this tree and in another checkout of it, in turn.

    python benchmarks/start_up.py --before ../older > benchmarks/results/start_up_cpu.json

Each command runs as a fresh process, once to fill the file cache and then `--repeats` times, with
this tree and the other in turn. Medians: `cpu` is processor time of the process (which work beside
it changes little), `wall` the clock's. `first_line` is up to the first line that the command
prints, `step` up to the line of fit's first step, `end` the whole command. A run of one step of the
quickstart's model is made first, on bytes of this file.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import report

HERE = Path(__file__).resolve()
TICK = os.sysconf("SC_CLK_TCK")


def commands(folder: Path) -> dict[str, list[str]]:
    """The commands that are timed, by name; `fit` comes first and leaves a run for the others."""
    experiment = ["--config", "mhc_quickstart"]
    run = str(folder / "run")
    data = [f"data.path={folder / 'data'}", f"output_dir={run}", "overwrite=true"]
    return {
        "fit": ["fit", *experiment, *data, "trainer.max_steps=1", "data.num_workers=0"],
        "plan": ["plan", *experiment],
        "inspect": ["inspect", run],
        "generate": [
            *("generate", *experiment, *data[:2], "ckpt_path=last", "prompt=The"),
            "max_new_tokens=10",
        ],
        "report": ["report", run, f"output={folder / 'report'}"],
        "help": ["--help"],
    }


def prepare(folder: Path, source: Path) -> None:
    """Prepare this file, many times over, as training data."""
    (folder / "text").mkdir()
    for number in range(20):
        (folder / "text" / f"{number}.txt").write_text(HERE.read_text(encoding="utf-8"))
    words = ["prepare", "--config", "mhc_quickstart", f"input={folder / 'text'}"]
    words.append(f"output={folder / 'data'}")
    done = _start(source, words)
    output, _ = done.communicate()
    assert done.returncode == 0, output


def timed(source: Path, words: list[str]) -> dict[str, float]:
    """Seconds of one run of a command."""
    start = time.perf_counter()
    process = _start(source, words)
    seconds: dict[str, float] = {}
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        for kind in ("first_line", *(["step"] if line.startswith("step 1") else [])):
            if kind not in seconds:
                seconds[kind] = time.perf_counter() - start
                seconds[f"{kind}_cpu"] = _processor_time(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, "".join(lines)
    return {
        **{(name if name.endswith("_cpu") else f"{name}_wall"): s for name, s in seconds.items()},
        "end_wall": time.perf_counter() - start,
        "end_cpu": usage.ru_utime + usage.ru_stime,
    }


def _start(source: Path, words: list[str]) -> "subprocess.Popen[str]":
    """A command of the package in `source`, on one thread; both of its outputs in one stream."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "mhc_lightning", *words],
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _processor_time(pid: int) -> float:
    """Seconds of processor time that a running process has taken, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="another checkout, to be timed in turn")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sources = {"now": HERE.parents[1] / "src"}
    if args.before is not None:
        sources = {"before": args.before.resolve() / "src", **sources}

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, sources["now"])
        for command, words in commands(folder).items():
            runs: dict[str, list[dict[str, float]]] = {tree: [] for tree in sources}
            for repeat in range(args.repeats + 1):
                for tree, source in sources.items():
                    seconds = timed(source, words)
                    if repeat:
                        runs[tree].append(seconds)
            for tree, measured in runs.items():
                medians = {
                    key: round(statistics.median(run[key] for run in measured), 2)
                    for key in measured[0]
                }
                rows.append({"command": command, "tree": tree, **medians})
    arguments = {"repeats": args.repeats, "threads": 1}
    report("start_up", {"arguments": arguments, "rows": rows})


if __name__ == "__main__":
    main()
