"""LoggedRun folders: found, read, and named."""

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
    """What a run's folder says.

    Attributes:
        folder: As it was given, or found.
        name: Short, and unlike that of any other run on the page.
        scalars: Series by tag.
        pictures: The newest picture by tag.
        config: The settings (``config.yaml``), or None where they were not written.
        environment: Versions, device and command (``environment.json``), or None.
        saved_steps: Of its checkpoints.
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
        """The last one that anything is known of."""
        logged = (int(s.steps[-1]) for s in self.scalars.values() if len(s))
        return max([0, *logged, *self.saved_steps])

    def setting(self, key: str) -> Any:
        """A setting by its dotted key; None where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def fact(self, key: str) -> Any:
        """An entry of the environment by its dotted key; None where there is none."""
        value: Any = self.environment
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_runs(paths: Sequence[str]) -> list[LoggedRun]:
    """Read the runs that paths lead to, each once, in the order given.

    Args:
        paths: LoggedRun folders, and folders with run folders somewhere below them.

    Raises:
        UserError: There is no such folder, or no metrics in one.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        for folder in _find(Path(path).expanduser(), path):
            folders.setdefault(folder.resolve(), folder)
    names = _short_names(list(folders))
    return [_read(folder, names[place]) for place, folder in folders.items()]


def _find(folder: Path, typed: str) -> list[Path]:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise UserError(
            f"{typed} is {what}; report takes run folders (what `fit` calls output_dir), and"
            " output=DIR and baseline=RUN"
        )
    if _holds_metrics(folder):
        return [folder]
    found: list[Path] = []
    for place, subfolders, _ in os.walk(folder):
        subfolders.sort()
        if _holds_metrics(Path(place)):
            found.append(Path(place))
            subfolders.clear()
    if not found:
        raise UserError(
            f"{typed} holds no metrics, neither {METRICS} nor TensorBoard event files, and no"
            " folder below it does"
        )
    return found


def _holds_metrics(folder: Path) -> bool:
    return (folder / METRICS).is_file() or any(folder.glob(EVENT_FILES))


def _short_names(places: list[Path]) -> dict[Path, str]:
    """The last parts of each path, as many as tell it from the others."""
    names = {}
    for place in places:
        for length in range(1, len(place.parts) + 1):
            tail = place.parts[-length:]
            if sum(other.parts[-length:] == tail for other in places) == 1:
                break
        names[place] = "/".join(tail)
    return names


def _read(folder: Path, name: str) -> LoggedRun:
    scalars = _read_table(folder / METRICS)  # exact, where event files have single precision
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
        config=_as_typed(_read_mapping(folder / CONFIG)),
        environment=_read_mapping(folder / ENVIRONMENT),
        saved_steps=tuple(saved_steps(folder / CHECKPOINTS)),
    )


def _read_table(file: Path) -> dict[str, Series]:
    """A series for each column; a last line that was cut, and what is no number, are left out."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    rows = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
    header = next(rows, [])
    if _STEP not in header:
        return {}
    at = header.index(_STEP)
    steps: list[int] = []
    values, logged = [], []
    for row in rows:
        numbers = [_number(cell) for cell in row]
        if len(row) == len(header) and (step := numbers[at]) is not None and math.isfinite(step):
            steps.append(int(step))
            logged.append(np.array([number is not None for number in numbers]))
            values.append(np.array(numbers, dtype=np.float64))  # None becomes NaN
    if not steps:
        return {}
    table, known, every = np.stack(values), np.stack(logged), np.array(steps)
    return {
        tag: Series.of(every[known[:, k]], table[known[:, k], k])
        for k, tag in enumerate(header)
        if k != at and known[:, k].any()
    }


def _number(text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _read_mapping(file: Path) -> dict[str, Any] | None:
    """A JSON or YAML file that holds a mapping; None where it does not."""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _as_typed(value: Any) -> Any:
    r"""Settings with ``\\${`` read as OmegaConf does: an escaped interpolation."""
    if isinstance(value, dict):
        return {key: _as_typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_typed(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\\\$\{", lambda match: match[1][: len(match[1]) // 2] + "${", value)
    return value
