"""Benchmarks of models with the ordinary residual connection, HC and mHC, side by side.

    python recipes/downstream/downstream.py residual=MODEL hc=MODEL mhc=MODEL [tasks=paper]
        [limit=N] [max_length=N] [include_path=DIR] [output=FOLDER] [key=value ...]

A model is a run's folder (its last checkpoint), a checkpoint in one, or an exported model. Each is
evaluated once, with `evaluate`, to which all other words go; then all are put in a table and a
picture, beside the paper's scores where the tasks are the paper's.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

from benchmark_picture import draw
from benchmark_scores import MODELS, PAPER_SOURCE, as_records, markdown, rows_of
from commands import run, shown
from provenance import write_json
from recipe_words import read_words

from mhc_lightning.errors import UserError
from mhc_lightning.interchange import Exported, open_exported

PACKAGES = ("mhc-lightning", "lm_eval", "torch")
ALIKE = ("n-shot", "n-samples", "versions")  # of what `evaluate` reports
_DEFAULTS = {
    **dict.fromkeys(MODELS, ""),
    "tasks": "paper",
    "limit": "",
    "max_length": "",
    "include_path": "",
    "output": "runs/downstream",
}
_NAMED = dict.fromkeys(("ckpt_path", "output_dir"), "mhc=CHECKPOINT")
_WITHOUT_EFFECT = ("batch_size", "evaluate.batch_size")  # on scores


@dataclass(frozen=True)
class Model:
    """A model to evaluate.

    Attributes:
        name: One of `MODELS`.
        weights: The checkpoint, or the folder of the exported model.
        run: The run that the checkpoint is of; None if it is an exported model.
        sequence_length: Tokens at once in training; None if that is not known.
        exported: What is known of an exported model.
    """

    name: str
    weights: Path
    run: Path | None
    sequence_length: int | None
    exported: Exported | None = None

    @property
    def record(self) -> dict[str, Any]:
        """The identity of these weights."""
        inside = self.weights.rglob("*") if self.weights.is_dir() else [self.weights]
        found = [file.stat() for file in inside if file.is_file()]
        return {
            "path": str(self.weights),
            "bytes": sum(stat.st_size for stat in found),
            "modified_ns": max((stat.st_mtime_ns for stat in found), default=0),
        }


def find_model(name: str, given: str) -> Model:
    """The model that a word of the command line names.

    Raises:
        SystemExit: There is none.
    """
    path = Path(given).expanduser()
    if (path / "config.yaml").is_file():
        run, weights = path, path / "checkpoints" / "last"
        if not weights.exists():
            raise SystemExit(f"error: the run {name}={given} has no checkpoint yet")
    elif (path / "config.json").is_file():
        try:
            return Model(name, path.resolve(), None, None, open_exported(path))
        except UserError as error:
            raise SystemExit(f"error: {error}") from error
    elif path.exists() and (path.resolve().parent.parent / "config.yaml").is_file():
        run, weights = path.resolve().parent.parent, path
    else:
        raise SystemExit(
            f"error: {name}={given} is no run, no checkpoint in one, and no exported model"
        )
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        length = int(config["data"]["sequence_length"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {run / 'config.yaml'} is not that of a run") from error
    return Model(name, weights.resolve(), run, length)


def experiment_of(exported: Exported) -> dict[str, Any]:
    """An experiment with the network of an exported model, as `--config` takes it."""
    model, connection = dict(exported.model), dict(exported.connection)
    return {
        # Of all connections this one has no settings, which would stay beside those given here.
        "defaults": [{"base": "experiment"}, {"override /connection": "residual"}, "_self_"],
        "model": {"_target_": model.pop("class"), **model},
        "connection": {"_target_": connection.pop("class"), "_partial_": True, **connection},
    }


def common_length(models: Sequence[Model], given: str) -> str:
    """Tokens that every model is to see at once.

    Raises:
        SystemExit: It is not known, or not the same for all.
    """
    if given:
        return given
    lengths = {model.sequence_length: model.name for model in models if model.sequence_length}
    if len(lengths) == 1:
        return str(next(iter(lengths)))
    trained = " and ".join(f"{name} on {length}" for length, name in lengths.items())
    reason = (
        f"{trained} tokens at once were trained"
        if lengths
        else "an exported model does not say how many tokens it was trained on at once"
    )
    raise SystemExit(f"error: {reason}; give max_length=N, for all models")


def evaluated(model: Model, settings: list[str], folder: Path) -> dict[str, Any] | None:
    """The results written for a model, or None if it was not evaluated yet.

    Raises:
        SystemExit: It is about another model, or with other settings.
    """
    file = folder / f"{model.name}.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    hint = "choose another output=FOLDER, or delete it"
    if found["settings"] != settings:
        raise SystemExit(
            f"error: {file} is with other settings ({shlex.join(found['settings'])}); {hint}"
        )
    if found["model"] != model.record:
        raise SystemExit(
            f"error: {file} is about other weights ({found['model']['path']}, as they were); {hint}"
        )
    return found


def evaluate(
    model: Model, settings: list[str], words: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Run `evaluate`; returns what `evaluated` does from then on."""
    own = folder / model.name
    if model.exported is None:
        assert model.run is not None
        config, output = model.run / "config.yaml", model.run
    else:
        config, output = own / "experiment.yaml", own
        own.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(experiment_of(model.exported), sort_keys=False)
        config.write_text(text, encoding="utf-8")
    record = model.record  # before: what is evaluated may be replaced meanwhile
    where = (f"output_dir={output}", f"ckpt_path={model.weights}")
    printed = run("evaluate", "--config", str(config), *where, *words, "--json", capture=True)
    result = {
        "model": record,
        "settings": settings,
        "packages": {package: version(package) for package in PACKAGES},
        "report": json.loads(printed),
    }
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{model.name}.json"
    write_json(result, aside)
    os.replace(aside, folder / f"{model.name}.json")
    return result


def check_alike(reports: dict[str, dict[str, Any]]) -> None:
    """Make sure that reports are of the same questions.

    Raises:
        SystemExit: They are not.
    """
    (first, expected), *others = reports.items()
    for name, report in others:
        for key in ALIKE:
            if report[key] != expected[key]:
                raise SystemExit(
                    f"error: {first} and {name} were not asked the same: {key} differs, as with"
                    " another version of the harness or of a task; choose another output=FOLDER"
                )


def main(words: list[str]) -> None:
    """Evaluate what was not yet, then compare."""
    read = read_words(words, _DEFAULTS, _NAMED)
    given, folder = read.settings, Path(read.settings["output"])
    if read.slurm or read.jobs != 1:
        raise SystemExit("error: this recipe has no jobs: models are evaluated one after another")
    models = [find_model(name, given[name]) for name in MODELS if given[name]]
    if not models:
        raise SystemExit(
            "error: there is nothing to evaluate: give residual=MODEL, hc=MODEL and mhc=MODEL, each"
            " a run's folder, a checkpoint in one, or an exported model"
        )
    length = common_length(models, given["max_length"])
    named = {key: given[key] for key in ("limit", "include_path") if given[key]}
    passed = [f"tasks={given['tasks']}", f"max_length={length}"]
    passed += [f"{key}={value}" for key, value in named.items()] + list(read.overrides)
    settings = [word for word in passed if word.partition("=")[0] not in _WITHOUT_EFFECT]
    records = {model.name: evaluated(model, settings, folder) for model in models}
    for model in models:
        if records[model.name] is None:
            records[model.name] = evaluate(model, settings, passed, folder)
        else:
            print(f"{folder / model.name}.json: has been evaluated before", file=sys.stderr)
    compare({name: record for name, record in records.items() if record}, folder, words)


def compare(records: dict[str, dict[str, Any]], folder: Path, words: list[str]) -> None:
    """Print and write the table, and draw it.

    Raises:
        SystemExit: The models were not asked the same, or nothing was scored.
    """
    reports = {name: record["report"] for name, record in records.items()}
    check_alike(reports)
    settings = next(iter(reports.values()))["settings"]
    rows = rows_of(reports)
    if not rows:
        raise SystemExit("error: the tasks have no score that is a number")
    of_paper = any(row.paper for row in rows)
    title = about(settings)
    models = {
        name: {
            **{key: report[key] for key in ("checkpoint", "step", "tokenizer", "shortened")},
            "packages": records[name]["packages"],
        }
        for name, report in reports.items()
    }

    def each(key: str) -> str:
        return ", ".join(f"{name} {model[key]:,}" for name, model in models.items())

    notes = [
        f"{title}.",
        f"Steps trained: {each('step')}.",
        "Behind ±: the harness's standard error; of a difference, as if scores were independent.",
    ]
    if any(model["shortened"] for model in models.values()):
        notes.append(f"Requests that lost the beginning of their context: {each('shortened')}.")
    if of_paper:
        notes.append(f"Paper: {PAPER_SOURCE}.")
    table = "\n".join([markdown(rows), *(f"- {note}" for note in notes)]) + "\n"
    print(f"\n{table}")
    (folder / "table.md").write_text(table, encoding="utf-8")
    values = {
        "command": shlex.join(["python", shown(Path(sys.argv[0]).resolve()), *words]),
        "settings": settings,
        "models": models,
        "paper": PAPER_SOURCE if of_paper else None,
        "rows": as_records(rows),
    }
    write_json(values, folder / "table.json")
    draw(rows, title, folder / "scores.png")
    print(f"wrote table.md, table.json and scores.png in {folder}")


def about(settings: dict[str, Any]) -> str:
    """The questions that were asked, in a line."""
    limit = settings["limit"]
    part = "all documents" if limit is None else f"only the first {limit} documents of each task"
    return f"{', '.join(settings['tasks'])}: {part}"


if __name__ == "__main__":
    main(sys.argv[1:])
