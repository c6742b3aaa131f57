"""The command `evaluate`: benchmarks of lm-evaluation-harness."""

import contextlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

from mhc_lightning.cli.arguments import Arguments
from mhc_lightning.cli.composition import Experiment
from mhc_lightning.errors import UserError

FOLDER = "evaluation"  # in output_dir


def evaluate(experiment: Experiment, arguments: Arguments) -> None:
    """Run `tasks` on `ckpt_path`, print the results and write them below `output_dir`.

    Raises:
        UserError: The harness is not installed, or a setting, a task, the tokenizer or the
            checkpoint is missing or wrong.
    """
    values = experiment.values()
    tasks = _names(values["evaluate"]["tasks"])
    if not tasks:
        raise UserError("evaluate needs tasks=NAME,NAME,…; tasks=paper runs the paper's eight")
    if values["ckpt_path"] is None:
        raise UserError("evaluate needs ckpt_path=last, ckpt_path=best or a checkpoint")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluate needs lm-evaluation-harness, which is not installed; install the extra"
            " `evaluate`: pip install 'mhc-lightning[evaluate]'"
        )
    with contextlib.redirect_stdout(sys.stderr):
        report = measure(experiment, tasks)
        table = None if arguments.json else _table(report)
        _write(report, Path(values["output_dir"]), tasks)
    print(json.dumps(report, allow_nan=False) if arguments.json else table)


def measure(experiment: Experiment, tasks: list[str]) -> dict[str, Any]:
    """The results of the harness, with the checkpoint, step and settings of the evaluation."""
    from mhc_lightning.cli.checkpoints import load_fitting, require_checkpoint, trained_steps
    from mhc_lightning.cli.components import build_model, build_trainer
    from mhc_lightning.cli.tokenizer import tokenizer_of
    from mhc_lightning.cli.value_types import check_arguments
    from mhc_lightning.evaluation.harness_model import HarnessModel
    from mhc_lightning.evaluation.harness_tasks import load_tasks, run_tasks, task_manager

    values = experiment.values()
    settings = values["evaluate"]
    if settings["max_length"] is None:
        settings["max_length"] = values["data"]["sequence_length"]
    sizes = {name: settings[name] for name in ("batch_size", "max_length")}
    amounts = {name: settings[name] for name in ("num_fewshot", "limit")}
    check_arguments("evaluate", HarnessModel, sizes)
    check_arguments("evaluate", run_tasks, amounts)
    path = require_checkpoint(experiment)
    trainer = build_trainer(experiment, logger=False, enable_checkpointing=False)
    module = build_model(experiment)
    checkpoint = load_fitting(path, module, experiment)
    tokenizer = tokenizer_of(experiment, checkpoint, path, module.model)
    module.start_from(checkpoint["state_dict"])
    precision = trainer.precision_plugin
    precision.convert_module(module.to(trainer.strategy.root_device)).eval()
    model = HarnessModel(module.model, tokenizer, seed=values["seed"], **sizes)
    loaded = load_tasks(task_manager(settings["include_path"] or None), tasks)
    with precision.forward_context():
        results = run_tasks(model, loaded, **amounts)
    if results["shortened"]:
        print(
            f"warning: {results['shortened']} requests lost the beginning of their context, longer"
            f" than evaluate.max_length={model.max_length}",
            file=sys.stderr,
        )
    return {
        "checkpoint": str(path),
        "step": trained_steps(checkpoint),
        "tokenizer": tokenizer.fingerprint,
        "settings": {**settings, "tasks": tasks},
        **results,
    }


def _names(tasks: Any) -> list[str]:
    """Task names from a list, or from text with commas, in brackets or not."""
    if isinstance(tasks, str):
        tasks = tasks.strip().removeprefix("[").removesuffix("]").split(",")
    return [name for task in tasks or [] if (name := str(task).strip())]


def _table(report: dict[str, Any]) -> str:
    from lm_eval.utils import make_table

    columns = [column for column in ("results", "groups") if report.get(column)]
    missing = "N/A"  # in place of null, which the harness cannot format
    shown = {
        column: {
            task: {key: missing if value is None else value for key, value in metrics.items()}
            for task, metrics in report[column].items()
        }
        for column in columns
    }
    return "\n".join(make_table({**report, **shown}, column) for column in columns).rstrip()


def _write(report: dict[str, Any], output_dir: Path, tasks: list[str]) -> None:
    from mhc_lightning.files.atomic import write_text_atomically

    name = re.sub(r"[^\w.-]+", "_", "+".join(tasks))[:80]
    file = output_dir / FOLDER / f"step_{report['step']:08d}_{name}.json"
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, text + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    print(f"wrote {file}", file=sys.stderr)
