"""The words of a recipe's command line."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Words:
    """The words of a recipe's command line.

    Attributes:
        settings: The recipe's own, by name.
        slurm: Those of SLURM, if any was named (``slurm.partition=NAME``).
        jobs: How many runs at a time (``jobs=N``).
        overrides: All others, for `fit`.
    """

    settings: dict[str, str]
    slurm: dict[str, Any] | None
    jobs: int
    overrides: tuple[str, ...]


def read_words(words: Iterable[str], defaults: dict[str, str], varied: Mapping[str, str]) -> Words:
    """Sort out the words of a recipe's command line; for ``--help``, show the recipe's docstring.

    Args:
        words: ``key=value``.
        defaults: The recipe's own keys with their values.
        varied: Settings by which the recipe's runs differ, with what chooses them; they cannot be
            settings of every run.

    Raises:
        SystemExit: A word is not understood, or not possible here; or after ``--help``.
    """
    settings, slurm, overrides, jobs = dict(defaults), {}, [], "1"
    for word in words:
        key, equals, value = word.partition("=")
        if word in ("--help", "-h"):
            print((sys.modules["__main__"].__doc__ or "").strip())
            raise SystemExit(0)
        if not equals and not word.startswith("~"):
            raise SystemExit(f"error: {word} is not understood; words are KEY=VALUE, or --help")
        if key.lstrip("+~") in varied:
            instead = varied[key.lstrip("+~")]
            raise SystemExit(f"error: {key}= differs between the runs; say {instead} instead")
        if key in settings:
            settings[key] = value
        elif key.startswith("slurm."):
            slurm[key.removeprefix("slurm.")] = int(value) if value.isdigit() else value
        elif key == "jobs":
            jobs = value
        else:
            overrides.append(word)
    if not jobs.isdecimal() or int(jobs) < 1:
        raise SystemExit(f"error: jobs={jobs} is not a number of runs, 1 or more")
    if slurm and jobs != "1":
        raise SystemExit("error: jobs= is for runs on this machine; SLURM has its own limits")
    return Words(settings, slurm or None, int(jobs), tuple(overrides))


def chosen(name: str, value: str, among: Iterable[str]) -> list[str]:
    """The members of a comma-separated list, each once; all of them for an empty one.

    Raises:
        SystemExit: One is unknown.
    """
    known = list(among)
    picked = list(dict.fromkeys(part for part in value.split(",") if part)) or known
    for part in picked:
        if part not in known:
            raise SystemExit(f"error: {name}={part} is not known; choose from {', '.join(known)}")
    return picked


def of_size(size: str, known: Mapping[str, _Value]) -> _Value:
    """The configuration of a size.

    Raises:
        SystemExit: There is no such size.
    """
    if size not in known:
        raise SystemExit(f"error: size={size} is not known; choose from {', '.join(known)}")
    return known[size]


def seeds_of(text: str) -> list[int]:
    """The seeds named.

    Raises:
        SystemExit: There is none, or one is no whole number.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise SystemExit(f"error: seeds={text} is not understood; whole numbers, as in seeds=1,2,3")
    return list(dict.fromkeys(map(int, words)))
