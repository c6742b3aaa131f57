"""The paper's stability comparison: every connection on the same model, data, order and seed.

    python recipes/stability/stability.py [size=cpu|gpu|paper] [only=hc,mhc] [output=FOLDER]
        [jobs=N | slurm.partition=NAME ...] [key=value ...]

Runs what has not ended yet, then writes one page about all of them and one that compares HC with
mHC, with the figures that correspond to 2, 3, 5, 7 and 8 of arXiv 2512.24880. Other settings go to
every `fit`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

from commands import run, shown
from library_text import prepare_library
from recipe_words import chosen, of_size, read_words
from sweep import Run, run_all

HERE = Path(__file__).parent
BASELINE = "residual"
VARIANTS = (
    *(BASELINE, "hc", "mhc", "mhc_single_pass", "mhc_lite", "krom", "identity"),
    *("hc_static", "hc_linear"),
)
FILES = {"cpu": "cpu.yaml", "gpu": "gpu.yaml"}
PAPER = {BASELINE: "baseline_27b", "hc": "hc_27b", "mhc": "mhc_27b"}
VARIED = {"connection": "only=hc,mhc", "output_dir": "output=FOLDER"}


def runs_of(size: str, only: str, overrides: tuple[str, ...]) -> list[Run]:
    """One run for each connection.

    Raises:
        SystemExit: There is no such size or connection.
    """
    if size == "paper":
        return [Run(name, PAPER[name], overrides) for name in chosen("only", only, PAPER)]
    config = shown(HERE / of_size(size, FILES))
    names = chosen("only", only, VARIANTS)
    return [Run(name, config, (f"connection={name}", *overrides)) for name in names]


def main(words: list[str]) -> None:
    """Prepare the text, run, report."""
    read = read_words(words, {"size": "cpu", "only": "", "output": ""}, VARIED)
    size = read.settings["size"]
    folder = Path(read.settings["output"] or f"runs/stability/{size}")
    runs = runs_of(size, read.settings["only"], read.overrides)
    if size != "paper":
        prepare_library(runs[0].config, read.overrides)
    outcomes = run_all(runs, folder, read.slurm, read.jobs)
    folders = {}
    for name, outcome in outcomes.items():
        if (outcome.folder / "metrics.csv").is_file():
            folders[name] = str(outcome.folder)
        else:
            print(f"{outcome.folder}: diverged before it logged anything", file=sys.stderr)
    if not folders:
        raise SystemExit("error: no run logged anything; lower optimizer.lr")
    compared = [f"baseline={folders[BASELINE]}"] if BASELINE in folders else []
    run("report", *folders.values(), *compared, f"output={folder / 'report'}")
    if {"hc", "mhc"} <= folders.keys():  # figure 2 has no other run
        pair = (folders["mhc"], folders["hc"], f"baseline={folders['mhc']}")
        run("report", *pair, f"output={folder / 'report_hc_minus_mhc'}")


if __name__ == "__main__":
    main(sys.argv[1:])
