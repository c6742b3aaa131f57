"""Finds experiments and config groups: in the shipped folder, and beside the user's file."""

import difflib
import re
from pathlib import Path

from mhc_lightning.errors import UserError


def shipped_folder() -> Path:
    """The package's configs: beside this package in a wheel, at the top of a source checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "configs"


def shipped_experiments() -> dict[str, str]:
    """Name of each shipped experiment, with the first line of its comment."""
    found = {}
    for file in sorted(shipped_folder().glob("*.yaml")):
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        found[file.stem] = first.lstrip("# ").strip()
    return found


def find_experiment(config: str) -> Path:
    """The file that a path or a bare name means.

    Raises:
        UserError: there is none; names the nearest that exist.
    """
    path = Path(config).expanduser()
    if path.is_file():
        if path.suffix != ".yaml":
            raise UserError(f"config {config} must be a .yaml file")
        return path.resolve()
    shipped = shipped_folder() / f"{config}.yaml"
    if "/" not in config and shipped.is_file():
        return shipped
    beside = [file.stem for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    names = list(dict.fromkeys([*shipped_experiments(), *beside]))
    close = difflib.get_close_matches(path.stem, names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(
        f"no config {config!r}, neither as a file nor by name; {hint}"
        f"shipped experiments: {', '.join(shipped_experiments()) or 'none'}"
    )


def choices_with(group: str, name: str) -> list[str]:
    """The shipped choices of a config group whose file has a setting of that name itself."""
    files = sorted((shipped_folder() / group).glob("*.yaml"))
    return [f.stem for f in files if re.search(rf"(?m)^{re.escape(name)}:", f.read_text("utf-8"))]


def group_choices(folders: list[Path]) -> dict[str, list[str]]:
    """Config groups found in `folders`, each with the names of its choices."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            groups.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(names) for group, names in sorted(groups.items())}
