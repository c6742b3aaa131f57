"""Compares initialisations by the diversity of mHC's streams, over depth and time.

    python recipes/initialisation/initialisation.py [size=cpu|gpu] [only=default,symmetric]
        [seeds=1,2,3] [output=FOLDER] [jobs=N | slurm.partition=NAME ...] [key=value ...]

The candidates are in starts.py. Other settings go to every `fit`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

from candidate import Candidate
from commands import shown
from diversity_picture import draw_diversity
from gaps import estimate
from library_text import prepare_library
from provenance import provenance, write_json
from recipe_words import chosen, of_size, read_words, seeds_of
from sweep import Run, run_all

from mhc_lightning.reporting.logged_runs import read_runs

HERE = Path(__file__).parent
DEFAULT = "default"
STARTS = "recipes.initialisation.starts"
CANDIDATES = {
    DEFAULT: "mhc_lightning.modules.ManifoldHyperConnection",
    "symmetric": f"{STARTS}.Symmetric",
    "strong_mixing": f"{STARTS}.StrongMixing",
    "uniform_mixing": f"{STARTS}.UniformMixing",
    "signed_writes": f"{STARTS}.SignedWrites",
    "signed_writes_strong_mixing": f"{STARTS}.SignedWritesStrongMixing",
    "one_stream_reads": f"{STARTS}.OneStreamReads",
    "xavier_projection": f"{STARTS}.XavierProjection",
    "small_projection": f"{STARTS}.SmallProjection",
}
FILES = {"cpu": "cpu.yaml", "gpu": "gpu.yaml"}
VARIED = {
    "connection": "only=default,symmetric",
    "connection._target_": "only=default,symmetric",
    "seed": "seeds=1,2,3",
    "output_dir": "output=FOLDER",
}


def runs_of(size: str, only: str, seeds: str, overrides: tuple[str, ...]) -> dict[str, list[Run]]:
    """The runs of each candidate, by seed.

    Raises:
        SystemExit: There is no such size or candidate, or a seed is not a number.
    """
    config = shown(HERE / of_size(size, FILES))
    return {
        name: [
            Run(
                f"{name}_{seed}",
                config,
                (f"connection._target_={CANDIDATES[name]}", f"seed={seed}", *overrides),
            )
            for seed in seeds_of(seeds)
        ]
        for name in chosen("only", only, CANDIDATES)
    }


def row(candidate: Candidate, default: Candidate | None) -> dict[str, Any]:
    """The results of a candidate."""
    if not candidate.runs:
        return {"candidate": candidate.name, "diverged_seeds": candidate.diverged}
    losses = candidate.validation_losses()
    layers, by_layer = candidate.diversity_by_layer()
    steps, by_step = candidate.diversity_by_step()
    gaps = candidate.gaps(default) if default and default is not candidate else []
    gap = estimate(gaps)
    return {
        "candidate": candidate.name,
        "diverged_seeds": candidate.diverged,
        "validation_loss": losses,
        "mean_validation_loss": float(np.mean(list(losses.values()))),
        "gap_to_default": gaps,
        "mean_gap_to_default": gap and vars(gap),  # with Student's 95% interval over seeds
        "largest_composite_gain_backward": candidate.largest_gain(),
        "diversity_by_step": dict(zip(steps.tolist(), by_step.tolist(), strict=True)),
        "diversity_by_layer": dict(zip(layers, by_layer.tolist(), strict=True)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The result as text."""
    lines = [
        "initialisation               validation loss  minus default (95%)        diversity  gain"
    ]
    for result in rows:
        if "validation_loss" not in result:
            lines.append(f"{result['candidate']:27}  diverged")
            continue
        gap = result["mean_gap_to_default"]
        about = f"{gap['mean']:+.4f}" if gap else ""
        about += (
            f" [{gap['low']:+.4f}, {gap['high']:+.4f}]" if gap and gap["low"] is not None else ""
        )
        last = list(result["diversity_by_step"].values())[-1]
        lines.append(
            f"{result['candidate']:27}  {result['mean_validation_loss']:15.4f}  {about:27}"
            f"{last:9.3f}  {result['largest_composite_gain_backward']:.3f}"
            + (f"  diverged: seeds {result['diverged_seeds']}" if result["diverged_seeds"] else "")
        )
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Prepare the text, train every candidate, write the results."""
    read = read_words(words, {"size": "cpu", "only": "", "seeds": "1,2,3", "output": ""}, VARIED)
    if Path.cwd() != HERE.parents[1]:
        raise SystemExit(f"error: call this in {HERE.parents[1]}: its runs import {STARTS}")
    size = read.settings["size"]
    runs = runs_of(size, read.settings["only"], read.settings["seeds"], read.overrides)
    folder = Path(read.settings["output"] or f"runs/initialisation/{size}")
    prepare_library(next(iter(runs.values()))[0].config, read.overrides)
    by_seed = [one for same_seed in zip(*runs.values(), strict=True) for one in same_seed]
    ended = run_all(by_seed, folder, read.slurm, read.jobs)
    candidates = []
    for name, own in runs.items():
        left, lost = {}, []
        for one in own:
            seed = int(one.name.rpartition("_")[2])
            if ended[one.name].diverged:
                lost.append(seed)
            else:
                (left[seed],) = read_runs([str(ended[one.name].folder)])
        candidates.append(Candidate(name, left, lost))
    default = next((c for c in candidates if c.name == DEFAULT and c.runs), None)
    rows = [row(candidate, default) for candidate in candidates]
    results = folder / "results"
    about = provenance([r for c in candidates for r in c.runs.values()], words)
    write_json({**about, "candidates": rows}, results / "initialisation.json")
    draw_diversity([c for c in candidates if c.runs], default, results / "initialisation.png")
    print(f"\n{table(rows)}\n\nwrote {results}")


if __name__ == "__main__":
    main(sys.argv[1:])
