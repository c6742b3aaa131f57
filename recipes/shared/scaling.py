"""The common part of the scaling recipes: command-line words, runs and costs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from commands import run, shown
from gaps import BASELINE, Cost, Measured, read_measured
from library_text import prepare_library
from recipe_words import Words, seeds_of
from sweep import Run, run_all

SETTINGS = {"size": "cpu", "only": f"{BASELINE},hc,mhc", "seeds": "1,2,3", "output": ""}
"""The words of a scaling recipe, with their defaults."""

_FAMILY = Path(__file__).parent / "family"
VARIED = {"seed": "seeds=1,2", "connection": "only=hc,mhc", "output_dir": "output=FOLDER"}
"""Settings by which their runs differ, with the words that choose them."""


@dataclass(frozen=True)
class Member:
    """A model that is trained with every connection and seed.

    Attributes:
        name: Short.
        config: The experiment, by name or file.
        overrides: Settings that differ from it.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()

    @property
    def typed(self) -> str:
        """The experiment as one would type it here."""
        return shown(Path(self.config))


@dataclass(frozen=True)
class Results:
    """A member's runs.

    Attributes:
        costs: By connection, the baseline first.
        runs: By connection and seed.
    """

    costs: dict[str, Cost]
    runs: dict[tuple[str, int], Measured]


def tiny(name: str, overrides: tuple[str, ...] = ()) -> Member:
    """One of the members that a CPU trains, in ``family/``."""
    return Member(name, str(_FAMILY / f"{name}.yaml"), overrides)


def connections_of(only: str) -> list[str]:
    """The connections named, with the baseline before them; `plan` refuses what is none.

    Raises:
        SystemExit: There is nothing to compare with the baseline.
    """
    names = list(dict.fromkeys([BASELINE, *filter(None, only.split(","))]))
    if len(names) == 1:
        raise SystemExit(f"error: only={only} leaves nothing to compare with {BASELINE}")
    return names


def runs_of(
    members: Sequence[Member],
    connections: Sequence[str],
    seeds: Sequence[int],
    overrides: tuple[str, ...],
) -> dict[tuple[str, str, int], Run]:
    """A run for each member, connection and seed."""
    return {
        (member.name, connection, seed): Run(
            f"{member.name}_{connection}_seed{seed}",
            member.typed,
            (f"connection={connection}", f"seed={seed}", *member.overrides, *overrides),
        )
        for member in members
        for seed in seeds
        for connection in connections
    }


def planned(member: Member, connection: str, overrides: tuple[str, ...]) -> Cost:
    """Parameters and arithmetic of a member with a connection."""
    return plan_cost(member.typed, (f"connection={connection}", *member.overrides, *overrides))


def plan_cost(config: str, overrides: Sequence[str]) -> Cost:
    """Parameters and arithmetic, as `plan` counts them."""
    record = json.loads(run("plan", "--config", config, *overrides, "--json", capture=True))
    return Cost(record["parameters"], record["flops_per_token"])


def carry_out(members: Sequence[Member], words: Words, folder: Path) -> dict[str, Results]:
    """Run what has not ended yet, and read all.

    Args:
        members: The models, the smallest first.
        words: What the recipe was called with. ``size=cpu`` trains on the standard library, unless
            ``data.path`` is given.
        folder: Where each run has a folder.

    Returns:
        By member.
    """
    connections, seeds = connections_of(words.settings["only"]), seeds_of(words.settings["seeds"])
    runs = runs_of(members, connections, seeds, words.overrides)
    costs = {m.name: {c: planned(m, c, words.overrides) for c in connections} for m in members}
    if words.settings["size"] == "cpu":
        prepare_library(members[0].typed, words.overrides)
    outcomes = run_all(runs.values(), folder, words.slurm, words.jobs)
    results = {member.name: Results(costs[member.name], {}) for member in members}
    for (member_name, connection, seed), each in runs.items():
        outcome = outcomes[each.name]
        measured = read_measured(outcome.folder, outcome.diverged)
        results[member_name].runs[connection, seed] = measured
    return results
