"""Where a recipe's numbers come from, and how they are written."""

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import shown

from mhc_lightning.reporting import facts
from mhc_lightning.reporting.reading import Run


def provenance(runs: Sequence[Run], words: Sequence[str]) -> dict[str, Any]:
    """The command, and the devices, versions and commits of runs; each list without repetition."""
    about = [facts.what_was_run(run) for run in runs]
    script = shown(Path(sys.argv[0]).resolve())
    return {
        "command": shlex.join(["python", script, *words]),
        **{
            key.lower(): list(dict.fromkeys(fact[key] for fact in about))
            for key in ("Device", "Versions", "Commit")
        },
    }


def write_json(values: dict[str, Any], file: Path) -> None:
    """Write plain values; what is not finite becomes a text, which JSON has no number for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(_plain(values), indent=2) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
