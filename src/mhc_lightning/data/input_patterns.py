"""Shell patterns that choose among the files of folders and the members of archives."""

import fnmatch
from collections.abc import Sequence


def matches(path: str, patterns: Sequence[str]) -> bool:
    """True if a path below an input matches a pattern.

    A pattern with a slash is matched with the whole path, one without with each part of it.
    """
    parts = path.split("/")
    return any(
        fnmatch.fnmatchcase(path, pattern)
        if "/" in pattern
        else any(fnmatch.fnmatchcase(part, pattern) for part in parts)
        for pattern in patterns
    )


def is_chosen(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """True if a path matches a pattern of `include`, if there is one, and none of `exclude`."""
    return not matches(path, exclude) and (not include or matches(path, include))


def is_visible(name: str) -> bool:
    """False for hidden files and folders, and for those that programs leave behind."""
    return not name.startswith(".") and name not in ("__pycache__", "__MACOSX")
