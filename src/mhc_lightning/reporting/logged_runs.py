"""Logged runs: finding run folders below given paths, and reading them."""

import csv
import io
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mhc_lightning.checkpoints.names import saved_steps
from mhc_lightning.errors import UserError
from mhc_lightning.files.run_layout import CHECKPOINTS, CONFIG, ENVIRONMENT, EVENT_FILES, METRICS
from mhc_lightning.reporting.metric_series import Series
from mhc_lightning.reporting.tensorboard_events import Picture, read_events

_STEP = "step"


@dataclass(frozen=True, eq=False)
class LoggedRun:
    """The contents of one run folder.

    Attributes:
        folder: As it was given, or found.
        name: Short, and different from those of the other runs.
        scalars: Series by tag.
        pictures: The newest picture by tag.
        config: The settings (`config.yaml`), or None where the file is missing.
        environment: Versions, device and command (`environment.json`), or None.
        saved_steps: Steps of its checkpoints.
    """

    folder: Path
    name: str
    scalars: dict[str, Series]
    pictures: dict[str, Picture]
    config: dict[str, Any] | None
    environment: dict[str, Any] | None
    saved_steps: tuple[int, ...] = ()

    @property
    def last_step(self) -> int:
        """The last step that was logged or saved."""
        logged = (int(s.steps[-1]) for s in self.scalars.values() if len(s))
        return max([0, *logged, *self.saved_steps])

    def setting(self, key: str) -> Any:
        """A setting by its dotted key; None where there is none."""
        return _look_up(self.config, key)

    def fact(self, key: str) -> Any:
        """An entry of the environment by its dotted key; None where there is none."""
        return _look_up(self.environment, key)


def _look_up(mapping: Any, key: str) -> Any:
    for part in key.split("."):
        mapping = mapping.get(part) if isinstance(mapping, dict) else None
    return mapping


def read_runs(paths: Sequence[str]) -> list[LoggedRun]:
    """Read all runs below some paths, each once, in the order given.

    Args:
        paths: Run folders, and folders with run folders somewhere below them.

    Raises:
        UserError: A folder does not exist, or holds no metrics.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        for folder in _find_run_folders(path):
            folders.setdefault(folder.resolve(), folder)
    names = _short_names(list(folders))
    return [_read_run(folder, names[resolved]) for resolved, folder in folders.items()]


def _find_run_folders(path: str) -> list[Path]:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        problem = "a file" if folder.exists() else "not there"
        raise UserError(
            f"{path} is {problem}; report takes run folders (what `fit` calls output_dir), and"
            " output=DIR and baseline=RUN"
        )
    if _holds_metrics(folder):
        return [folder]
    run_folders: list[Path] = []
    for parent, subfolders, _ in os.walk(folder):
        subfolders.sort()
        if _holds_metrics(Path(parent)):
            run_folders.append(Path(parent))
            subfolders.clear()
    if not run_folders:
        raise UserError(
            f"{path} holds no metrics, neither {METRICS} nor TensorBoard event files, and no"
            " folder below it does"
        )
    return run_folders


def _holds_metrics(folder: Path) -> bool:
    return (folder / METRICS).is_file() or any(folder.glob(EVENT_FILES))


def _short_names(folders: list[Path]) -> dict[Path, str]:
    """The last parts of each path, as many as distinguish it from the others."""
    names = {}
    for folder in folders:
        for length in range(1, len(folder.parts) + 1):
            tail = folder.parts[-length:]
            if sum(other.parts[-length:] == tail for other in folders) == 1:
                break
        names[folder] = "/".join(tail)
    return names


def _read_run(folder: Path, name: str) -> LoggedRun:
    scalars = _read_metrics(folder / METRICS)  # exact; event files have single precision
    events = read_events(folder, without=scalars)
    more = {t: Series.of(points, points.values()) for t, points in events.scalars.items() if points}
    scalars = {**scalars, **more}
    if not scalars:
        raise UserError(f"{folder}: nothing is logged there yet")
    return LoggedRun(
        folder=folder,
        name=name,
        scalars=scalars,
        pictures=events.pictures,
        config=_unescape(_read_mapping(folder / CONFIG)),
        environment=_read_mapping(folder / ENVIRONMENT),
        saved_steps=tuple(saved_steps(folder / CHECKPOINTS)),
    )


def _read_metrics(file: Path) -> dict[str, Series]:
    """A series for each column of `metrics.csv`.

    Cells that are not numbers are left out, and so is a truncated last line.
    """
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    rows = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
    header = next(rows, [])
    if _STEP not in header:
        return {}
    step_column = header.index(_STEP)
    steps: list[int] = []
    values, logged = [], []
    for row in rows:
        numbers = [_number(cell) for cell in row]
        if len(row) != len(header):
            continue
        step = numbers[step_column]
        if step is not None and math.isfinite(step):
            steps.append(int(step))
            logged.append([number is not None for number in numbers])
            values.append(np.array(numbers, dtype=np.float64))  # None becomes NaN
    if not steps:
        return {}
    table, is_logged, all_steps = np.stack(values), np.array(logged), np.array(steps)
    return {
        tag: Series.of(all_steps[is_logged[:, k]], table[is_logged[:, k], k])
        for k, tag in enumerate(header)
        if k != step_column and is_logged[:, k].any()
    }


def _number(text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _read_mapping(file: Path) -> dict[str, Any] | None:
    """The mapping in a JSON or YAML file; None where there is none."""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _unescape(value: Any) -> Any:
    r"""Settings with OmegaConf's escaped interpolations, `\\${`, read as OmegaConf does."""
    if isinstance(value, dict):
        return {key: _unescape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unescape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\\\$\{", lambda match: match[1][: len(match[1]) // 2] + "${", value)
    return value
