"""Measured times of a pipeline's stages, read from a file.

The file is JSON, in seconds for one micro-batch::

    {
      "stages": [
        {"forward": 0.011, "backward": 0.022, "backward_weight": 0.010, "replay": 0.0004,
         "merge_forward": 0.0003, "merge_backward": 0.0005},
        ...
      ],
      "transfers": 0.0003,
      "update": 0.02
    }

`stages` has one entry per stage, from the first to the last. `forward` and `backward` are required.

- `backward`: the whole backward pass, without rebuilding;
- `backward_weight`: the part of `backward` that computes gradients of weights; schedules that split
  the backward pass need it;
- `replay`: rebuilding of streams;
- `merge_forward`, `merge_backward`: the merges of feed-forward sub-layers, contained in the passes;
- `dispatch`, `combine`: all-to-alls of experts that are spread over devices, forward, not contained
  in the passes; `expert_layers`, the number of layers that they belong to;
- `feed_forward`: the share of feed-forward sub-layers in the passes.

`transfers` is the time to send a micro-batch to another device: one number, or one for each
boundary; by default 0. `update` is the optimizer's step; by default the roofline's.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mhc_lightning.errors import UserError
from mhc_lightning.planning.simulation import StageTimes

_STAGE = tuple(field.name for field in fields(StageTimes))
_FILE = ("stages", "transfers", "update")


@dataclass(frozen=True)
class MeasuredTimes:
    """Measured times, in seconds.

    Attributes:
        file: Name of the file.
        stages: Times of each stage.
        transfers: Time of a transfer across each boundary.
        update: Time of the optimizer's step, or None.
    """

    file: str
    stages: tuple[StageTimes, ...]
    transfers: tuple[float, ...]
    update: float | None

    def check(self, stages: int) -> None:
        """Refuse times for another number of stages.

        Raises:
            UserError: The number of stages differs.
        """
        if len(self.stages) != stages:
            raise UserError(
                f"times={self.file} has {len(self.stages)} stages, but the layout has {stages}"
            )


def read_times(file: str) -> MeasuredTimes:
    """Read a file of times.

    Raises:
        UserError: The file cannot be read, or an entry is wrong; names the entry.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"times={file} cannot be read: {error}") from error
    content = _mapping(file, "it", content, _FILE)
    entries = content.get("stages")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"times={file}: stages must be a list with an entry for each stage")
    stages = tuple(_stage(file, number, entry) for number, entry in enumerate(entries))
    transfers = content.get("transfers", 0.0)
    if not isinstance(transfers, list):
        transfers = [transfers] * (len(stages) - 1)
    if len(transfers) != len(stages) - 1:
        raise UserError(
            f"times={file}: transfers must be one number, or {len(stages) - 1} for the boundaries"
            f" of {len(stages)} stages, not {len(transfers)}"
        )
    update = content.get("update")
    return MeasuredTimes(
        file,
        stages,
        tuple(_seconds(file, "transfers", value) for value in transfers),
        None if update is None else _seconds(file, "update", update),
    )


def _stage(file: str, number: int, entry: Any) -> StageTimes:
    where = f"stages[{number}]"
    entry = _mapping(file, where, entry, _STAGE)
    for name in ("forward", "backward"):
        if not entry.get(name):
            raise UserError(f"times={file}: {where} needs {name}, more than 0 seconds")
    numbers = {k: _seconds(file, f"{where}.{k}", v) for k, v in entry.items()}
    layers = numbers.pop("expert_layers", 1)
    if layers < 1 or layers != int(layers) or numbers.get("feed_forward", 0.0) > 1:
        raise UserError(
            f"times={file}: {where}.expert_layers must be a whole number from 1 on, and"
            " feed_forward a share of at most 1"
        )
    times = StageTimes(**numbers, expert_layers=int(layers))
    weight = times.backward_weight or 0.0
    for name, part, whole in (
        ("backward_weight", weight, times.backward),
        ("merge_forward", times.merge_forward, times.forward),
        ("merge_backward", times.merge_backward, times.backward - weight),
    ):
        if part > whole:
            raise UserError(
                f"times={file}: {where}.{name} is longer than the {whole:g} s that contain it"
            )
    return times


def _mapping(file: str, where: str, value: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or not value.keys() <= set(known):
        raise UserError(f"times={file}: {where} must be an object with {', '.join(known)}")
    return value


def _seconds(file: str, where: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise UserError(f"times={file}: {where} must be seconds, 0 or more, not {value!r}")
    return float(value)
