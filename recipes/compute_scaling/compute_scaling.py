"""The paper's compute scaling (Fig. 6(a) of arXiv 2512.24880): loss gaps over a family of models.

    python recipes/compute_scaling/compute_scaling.py [size=cpu|gpu|paper] [members=NAME,...]
        [only=hc,mhc] [seeds=1,2,3] [output=FOLDER] [jobs=N | slurm.partition=NAME ...]
        [key=value ...]

Runs what has not ended yet, then compares the last validation losses. Other settings go to every
`fit`.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

from gaps import Point, last_step, points_at
from recipe_words import chosen, of_size, read_words
from scaling import SETTINGS, VARIED, Member, Results, carry_out, tiny
from scaling_figure import panels
from scaling_results import described_lines, described_power_law, gap_lines, write_results

SIZES = {
    "cpu": [tiny("200k"), tiny("700k"), tiny("1700k"), tiny("3m")],
    "gpu": [
        Member(name, f"mhc_{name}", ("trainer.precision=bf16-mixed",))
        for name in ("10m", "50m", "150m", "500m")
    ],
    "paper": [Member(name, f"mhc_{name}") for name in ("3b", "9b", "27b")],
}
FITTED = "straight lines in log10(FLOPs) through the members' gaps and ratios"
POWER_LAWS = "power laws without a floor through their losses"


def members_of(size: str, names: str) -> list[Member]:
    """The models of a size, the smallest first.

    Raises:
        SystemExit: There is no such size or member.
    """
    members = of_size(size, SIZES)
    picked = chosen("members", names, [member.name for member in members])
    return [member for member in members if member.name in picked]


def points_of(results: dict[str, Results]) -> list[Point]:
    """Each member's last validation."""
    return [
        point
        for member, found in results.items()
        for point in points_at(member, last_step(found.runs), found.runs, found.costs)
    ]


def power_laws(points: list[Point]) -> list[dict[str, Any]]:
    """One for each connection."""
    names = dict.fromkeys(point.connection for point in points)
    return [described_power_law(n, [p for p in points if p.connection == n]) for n in names]


def main(words: list[str]) -> None:
    """Run, compare, write."""
    read = read_words(words, {**SETTINGS, "members": ""}, VARIED)
    members = members_of(read.settings["size"], read.settings["members"])
    folder = Path(read.settings["output"] or f"runs/compute_scaling/{read.settings['size']}")
    results = carry_out(members, read, folder)
    points = points_of(results)
    lines = gap_lines(points)
    write_results(
        folder / "results" / "compute_scaling.json",
        words,
        results,
        points,
        (f"{FITTED}; {POWER_LAWS}", [*described_lines(lines), *power_laws(points)]),
        panels(points, lines, logarithmic=True),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
