"""The tasks of the harness: loaded by name, and evaluated on a model."""

import difflib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from mhc_lightning.errors import UserError
from mhc_lightning.evaluation.harness_model import HarnessModel

TASKS = Path(__file__).parent / "tasks"
_REPORTED = ("results", "groups", "group_subtasks", "n-shot", "n-samples", "versions",
             "higher_is_better")  # fmt: skip
# Exceptions when a task is loaded whose files or data are wrong or unreachable.
_TASK_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)


def task_manager(include_path: str | Path | None = None) -> TaskManager:
    """The tasks of the harness, this package's group `paper`, and the tasks in a folder.

    Raises:
        UserError: The folder does not exist, or a file in it is not YAML.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"evaluate.include_path={include_path} is no folder")
    folders = [TASKS] if include_path is None else [TASKS, Path(include_path)]
    try:
        return TaskManager(include_path=folders)
    except yaml.YAMLError as error:
        raise UserError(f"a task in {include_path} is not valid YAML: {error}") from error


def load_tasks(manager: TaskManager, names: Sequence[str]) -> Any:
    """Load tasks, groups or tags by name (or pattern), with their data.

    Raises:
        UserError: A name is unknown, or a task or its data cannot be loaded.
    """
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"there is no task {name!r}; {hint}`lm-eval ls tasks` lists the harness's, `paper`"
                " is the paper's eight, and include_path=FOLDER adds others"
            )
    try:
        return manager.load(manager.match_tasks(list(names)))
    except (*_TASK_FAULTS, yaml.YAMLError) as error:
        raise UserError(
            f"cannot load {', '.join(names)}: {type(error).__name__}: {error}; are its data within"
            " reach (the hub, or a local cache)?"
        ) from error


def run_tasks(
    model: HarnessModel,
    loaded: Any,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
) -> dict[str, Any]:
    """Evaluate a model on tasks.

    Args:
        model: The model.
        loaded: The result of `load_tasks`.
        num_fewshot: Examples before each question, for tasks that allow them; None for the number
            of the task.
        limit: Largest number of documents per task.
        seed: Seed of the choice of examples.

    Returns:
        The results of the harness as JSON can hold them (NaN and missing values are null), and
        `shortened`, the number of requests whose context lost its beginning.

    Raises:
        UserError: A setting is out of range.
    """
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise UserError(f"evaluate.{name} must be at least {least}, not {value}")
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    results = evaluate(lm=model, task_dict=loaded, limit=limit, log_samples=False)
    assert results is not None  # None in all processes but the first
    report = {name: _plain(results[name]) for name in _REPORTED if name in results}
    return {**report, "shortened": model.shortened}


def _plain(value: Any) -> Any:
    """Nested results as JSON can hold them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str) or value is None:
        return None if value == "N/A" else value
    if isinstance(value, bool | int):
        return value
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    number = float(value)
    return number if math.isfinite(number) else None
