"""The provenance of a recipe's numbers, and the writing of its JSON."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import shown

from mhc_lightning.formatting import json_value
from mhc_lightning.reporting.logged_runs import LoggedRun
from mhc_lightning.reporting.run_description import describe_run


def provenance(runs: Sequence[LoggedRun], words: Sequence[str]) -> dict[str, Any]:
    """The command, and the devices, versions and commits of runs; each list without repetition."""
    about = [describe_run(run) for run in runs]
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
    file.write_text(json.dumps(json_value(values), indent=2) + "\n", encoding="utf-8")
