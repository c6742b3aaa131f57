"""The paper's token scaling (Fig. 6(b) of arXiv 2512.24880): loss gaps along one training.

    python recipes/token_scaling/token_scaling.py [size=cpu|gpu|paper] [only=hc,mhc] [seeds=1,2,3]
        [output=FOLDER] [jobs=N | slurm.partition=NAME ...] [key=value ...]

Runs what has not ended yet, then compares every validation loss on the way. Other settings go to
every `fit`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

from gaps import Point, last_step, points_at
from recipe_words import of_size, read_words
from scaling import SETTINGS, VARIED, Member, Results, carry_out, tiny
from scaling_figure import panels
from scaling_results import described_lines, gap_lines, write_results

LONG = (  # a tiny member for eight times its tokens, validated twenty times
    *("trainer.max_steps=3200", "trainer.val_check_interval=160"),
    *("checkpoint.every_n_steps=320", "data.validation_sequences=512"),
)
SIZES = {
    "cpu": tiny("700k", LONG),
    "gpu": Member("150m", "mhc_150m", ("trainer.precision=bf16-mixed",)),
    "paper": Member("3b_1t", "mhc_3b_1t"),
}
FIT_FROM, FIT_TO = 0.2, 0.8
"""The part of the run that lines are fitted to. After it, the learning rate falls in two steps."""
FITTED = (
    f"straight lines in log10(FLOPs) through the gaps and ratios from {FIT_FROM:.0%} to"
    f" {FIT_TO:.0%} of the run"
)


def points_of(member: str, results: Results) -> list[Point]:
    """Every validation on the way; the end also if none got there."""
    validated = {step for run in results.runs.values() for step in run.losses}
    steps = sorted({*validated, last_step(results.runs)})
    return [p for step in steps for p in points_at(member, step, results.runs, results.costs)]


def main(words: list[str]) -> None:
    """Run, compare, write."""
    read = read_words(words, SETTINGS, VARIED)
    member = of_size(read.settings["size"], SIZES)
    folder = Path(read.settings["output"] or f"runs/token_scaling/{read.settings['size']}")
    results = carry_out([member], read, folder)
    found = results[member.name]
    points = points_of(member.name, found)
    steps = next(iter(found.runs.values())).max_steps
    lines = gap_lines(p for p in points if FIT_FROM * steps <= p.step <= FIT_TO * steps)
    write_results(
        folder / "results" / "token_scaling.json",
        words,
        results,
        points,
        (FITTED, described_lines(lines)),
        panels(points, lines, logarithmic=False),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
