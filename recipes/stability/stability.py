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
from library_text import prepare_words
from sweep import Run, chosen, read_words, run_all

HERE = Path(__file__).parent
BASELINE = "residual"
VARIANTS = (
    *(BASELINE, "hc", "mhc", "mhc_single_pass", "mhc_lite", "krom", "identity"),
    *("hc_static", "hc_linear"),
)
PAPER = {BASELINE: "baseline_27b", "hc": "hc_27b", "mhc": "mhc_27b"}


def runs_of(size: str, only: str, overrides: tuple[str, ...]) -> list[Run]:
    """One run for each connection.

    Raises:
        SystemExit: There is no such size or connection.
    """
    if size == "paper":
        return [Run(name, PAPER[name], overrides) for name in chosen("only", only, PAPER)]
    chosen("size", size, ("cpu", "gpu", "paper"))
    config = shown(HERE / f"{size}.yaml")
    names = chosen("only", only, VARIANTS)
    return [Run(name, config, (f"connection={name}", *overrides)) for name in names]


def main(words: list[str]) -> None:
    """Prepare the text, run, report."""
    read = read_words(words, {"size": "cpu", "only": "", "output": ""})
    size = read.settings["size"]
    folder = Path(read.settings["output"] or f"runs/stability/{size}")
    runs = runs_of(size, read.settings["only"], read.overrides)
    if size != "paper" and not any(word.startswith("data.path=") for word in read.overrides):
        run(*prepare_words(runs[0].config, "data/python"))
    outcomes = run_all(runs, folder, read.slurm, read.jobs)
    folders = {name: str(outcome.folder) for name, outcome in outcomes.items()}
    compared = [f"baseline={folders[BASELINE]}"] if BASELINE in folders else []
    run("report", *folders.values(), *compared, f"output={folder / 'report'}")
    if {"hc", "mhc"} <= folders.keys():  # figure 2 has no other run
        words = (folders["mhc"], folders["hc"], f"baseline={folders['mhc']}")
        run("report", *words, f"output={folder / 'report_hc_minus_mhc'}")


if __name__ == "__main__":
    main(sys.argv[1:])
