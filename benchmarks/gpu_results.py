"""The file of one part of the GPU suite, written again with every row."""

import json
import re
from pathlib import Path
from typing import Any

from gpu_bench import Bench
from timing import environment


def file_name(device: str) -> str:
    """A device's name as it stands in names of files."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


class Results:
    """Rows of one part, each known by its key.

    Args:
        part: The part's name.
        bench: Where it is measured.
        folder: Where the file goes.
        resume: Whether to keep the rows that the file holds already, and not measure them again.
        commit: Of the source, where the tree is no git repository.
    """

    def __init__(
        self, part: str, bench: Bench, folder: Path, resume: bool = False, commit: str = ""
    ) -> None:
        self.part, self.bench = part, bench
        self.path = folder / f"gpu_{part}_{file_name(bench.name)}.json"
        about = environment(bench.device)
        if commit:
            about["commit"] = commit
        self._record: dict[str, Any] = {
            "benchmark": f"gpu_{part}",
            "toy": bench.toy,
            "environment": about,
            "rows": [],
        }
        if resume and self.path.is_file():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            if earlier["environment"]["device"] == about["device"]:
                self._record["rows"] = [row for row in earlier["rows"] if "error" not in row]
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return self._record["rows"]

    def wants(self, **key: Any) -> bool:
        """True if a row is still to be measured and there is time for it."""
        if any(all(row.get(name) == value for name, value in key.items()) for row in self.rows):
            return False
        if self.bench.out_of_time:
            self.stopped_early()
            return False
        return True

    def stopped_early(self) -> None:
        """Note that there was no time for something."""
        self._record["stopped_early"] = True
        self._write()

    def add(self, **row: Any) -> None:
        """Add a row, show it, and write the file."""
        self.rows.append(row)
        self._write()
        print(_line(row), flush=True)

    def _write(self) -> None:
        beside = self.path.with_suffix(".part")
        head = {name: value for name, value in self._record.items() if name != "rows"}
        rows = ",\n".join("  " + json.dumps(row) for row in self.rows)
        beside.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}\n', encoding="utf-8")
        beside.replace(self.path)


def _line(row: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return f"{1e3 * value['median']:.4f} ms" if "median" in value else "…"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{name}={shown(value)}" for name, value in row.items() if value is not None)
