"""What a memory of n-grams is worth: beside experts, by rows, by depth, and with each connection.

    python recipes/memory/memory.py [part=allocation,scaling,where,what_for,connections]
        [seeds=1,2,3] [output=FOLDER] [jobs=N | slurm.partition=NAME ...] [key=value ...]

Runs what has not ended yet, then writes each part's JSON and figure. Other settings go to every
`fit`.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

from gaps import read_measured
from laws import PAPER, described
from memory_picture import draw_part
from parts import PARTS, Variant
from provenance import provenance, write_json
from recipe_words import Words, chosen, read_words, seeds_of
from scaling import plan_cost
from subwords import prepare_subwords
from sweep import Run, run_all
from trained import Trained, with_gaps

from mhc_lightning.reporting.logged_runs import read_runs

SETTINGS = {"part": "", "seeds": "1,2,3", "output": ""}
VARIED = {"memory": "part=where", "seed": "seeds=1,2,3", "output_dir": "output=FOLDER"}


def carry_out(part: str, words: Words, folder: Path) -> list[Trained]:
    """Run what has not ended yet of a part, and read all of it.

    Args:
        part: A key of `PARTS`.
        words: What the recipe was called with.
        folder: Where each run has a folder.
    """
    seeds = seeds_of(words.settings["seeds"])
    costs = functools.cache(plan_cost)
    variants = PARTS[part](words.overrides, costs)
    prepare_subwords(variants[0].config, words.overrides)
    runs = {(v.name, seed): run_of(v, seed) for seed in seeds for v in variants}
    outcomes = run_all(runs.values(), folder, words.slurm, words.jobs)
    measured = []
    for variant in variants:
        own = [(seed, outcomes[runs[variant.name, seed].name]) for seed in seeds]
        measured.append({seed: read_measured(o.folder, o.diverged) for seed, o in own})
    return with_gaps(variants, [costs(v.config, v.overrides) for v in variants], measured)


def run_of(variant: Variant, seed: int) -> Run:
    """A variant's run with a seed."""
    overrides = (*variant.overrides, f"seed={seed}")
    return Run(f"{variant.run}_seed{seed}", variant.config, overrides)


def write(part: str, found: Sequence[Trained], words: Sequence[str], folder: Path) -> None:
    """Write a part's JSON and figure, and print its table."""
    ended = [
        str(run.folder)
        for one in found
        for run in one.runs.values()
        if not run.diverged and run.folder
    ]
    record = {
        **provenance(read_runs(ended), words),
        "part": part,
        "seeds": list(found[0].runs),
        "loss": "val/loss: nats per token on held-out text, at the end",
        "validation_tokens_at_most": next(iter(found[0].runs.values())).validation_tokens,
        "gap": "loss minus that of the variant named by `minus`, in pairs of the same seed",
        "intervals": "95%, Student's t over seeds; none for a single seed",
        "flops": "plan's FLOPs per token (forward and backward) times tokens",
        "paper": PAPER[part],
        "variants": [one.described() for one in found],
        **described(part, found),
    }
    file = folder / "results" / f"{part}.json"
    write_json(record, file)
    draw_part(part, found, file.with_suffix(".png"))
    print(f"\n{table(found)}\n\nwrote {file} and {file.with_suffix('.png')}")


def table(found: Sequence[Trained]) -> str:
    """The result as text."""
    lines = [
        f"{'variant':28}{'parameters':>12}{'MFLOPs/token':>14}{'tokens':>12}{'loss':>9}  gap (95%)"
    ]
    for one in found:
        parameters, flops = one.cost.parameters["total"], one.cost.flops_per_token / 1e6
        loss = f"{one.mean:.4f}" if one.losses else "none"
        lines.append(
            f"{one.variant.name:28}{parameters:12,}{flops:14.2f}{one.tokens:12,}{loss:>9}"
            f"  {'' if one.gap is None else one.gap.text()}".rstrip()
        )
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Run, compare, write: one part after the other."""
    read = read_words(words, SETTINGS, VARIED)
    parts = chosen("part", read.settings["part"], PARTS)
    if "connections" in parts and any(w.startswith("connection=") for w in read.overrides):
        raise SystemExit("error: connection= differs between the runs of part=connections")
    folder = Path(read.settings["output"] or "runs/memory/cpu")
    for part in parts:
        write(part, carry_out(part, read, folder), words, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
