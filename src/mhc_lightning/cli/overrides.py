"""Overrides of a command line: which keys they set, and values that Hydra can read."""

import difflib
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse as parse_interpolations

from mhc_lightning.cli.experiments import choices_with
from mhc_lightning.errors import UserError


def split_by_group(
    overrides: list[str], groups: dict[str, list[str]]
) -> tuple[list[str], list[str]]:
    """Overrides that choose a group's file, and the others; refuses files that do not exist."""
    choices, settings = [], []
    for word in overrides:
        group = key_of(word)
        if not group or ("@" in word.partition("=")[0] and group not in groups):
            raise _unreadable_key(word)
        if group not in groups or word.startswith("~"):
            settings.append(word)
            continue
        word, _ = _readable(word)
        value = OverridesParser.create().parse_override(word).value()
        for name in value if isinstance(value, list) else [value]:
            if str(name) not in groups[group]:
                raise UserError(
                    f"{group}={name}: there is no such choice;"
                    f" available for {group}: {', '.join(groups[group])}"
                )
        choices.append(word)
    return choices, settings


def with_known_key(word: str, keys: set[str], groups: dict[str, list[str]], section: str) -> str:
    """An override of an existing key, written out in full; `+` may add one."""
    marks = word[: len(word) - len(word.lstrip("+~"))]
    if marks.startswith("+"):
        return word
    key = key_of(word)
    full = full_key(key, keys, section)
    if full not in keys:
        group, _, name = key.partition(".")
        others = choices_with(group, name)
        near = nearest_key(key, keys | set(groups))
        hint = f"did you mean {near!r}? " if near else ""
        if others:
            hint = f"it is a setting of {group}={'|'.join(others)}, which is not chosen; "
        raise UserError(
            f"unknown key {key!r}; {hint}--print-config lists all keys, and +{key}=… adds one"
        )
    return marks + full + word.lstrip("+~")[len(key) :]


def with_readable_value(word: str, plain: DictConfig) -> str:
    """The override as Hydra reads it: an unreadable value is quoted, but not for a list or section.

    Args:
        word: The override.
        plain: The experiment without it.

    Raises:
        UserError: the key or the value cannot be read.
    """
    readable, fault = _readable(word)
    if fault and OmegaConf.is_config(OmegaConf.select(plain, key_of(word), throw_on_missing=False)):
        raise UserError(
            f"cannot read the value of {word!r}: {fault}; a list is written 'key=[a,b]', a mapping"
            " 'key={a: b}', and a text in one that has special characters between quotes, as in"
            ' \'key=["a#b","c"]\''
        )
    return readable


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """The key that was probably meant: the same last part counts most, then likeness."""
    last = key.rpartition(".")[2]

    def likeness(known: str) -> float:
        whole = difflib.SequenceMatcher(None, key, known).ratio()
        part = difflib.SequenceMatcher(None, last, known.rpartition(".")[2]).ratio()
        return whole + part

    best = max(sorted(keys), key=likeness, default=None)
    return best if best is not None and likeness(best) > 0.8 else None


def key_of(override: str) -> str:
    """The key of `key=value`, without Hydra's marks before it and a package after it."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def full_key(key: str, keys: set[str], section: str) -> str:
    """The key with its command's section, where it was left out."""
    within = f"{section}.{key}"
    return within if key not in keys and section and within in keys else key


def _readable(word: str) -> tuple[str, str | None]:
    """An override whose value is quoted where Hydra's grammar cannot read it.

    Interpolations keep their meaning in either case. A value that stands for several (`a,b`,
    `range(1,3)`) has no meaning here, where one run is composed.

    Returns:
        The override as it is or with its value quoted, and why that was needed, if it was.

    Raises:
        UserError: the key cannot be read, or an interpolation in the value is not complete.
    """
    parser = OverridesParser.create()
    try:
        if not parser.parse_override(word).is_sweep_override():
            return word, None
        fault = "it stands for several values"
    except HydraException as error:
        fault = flat(str(error).partition("\n")[0])
    key, given, value = word.partition("=")
    quoted = f"{key}{given}{QuotedString(value, Quote.single).with_quotes()}" if given else key
    try:
        parser.parse_override(quoted)
    except HydraException as error:
        raise _unreadable_key(word) from error
    try:
        parse_interpolations(value)
    except GrammarParseError as error:
        raise UserError(
            f"cannot read the value of {word!r}: '${{' begins what '}}' has to end, such as"
            " ${oc.env:HOME}; for the characters themselves write '\\${'"
        ) from error
    return quoted, fault


def _unreadable_key(word: str) -> UserError:
    return UserError(
        f"cannot read the override {word!r}: {word.partition('=')[0]!r} is no key; overrides are"
        " key=value, +key=value adds a key, and ~key removes one"
    )


def flat(text: str) -> str:
    """A message of Hydra, OmegaConf or YAML, in one line."""
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("object_type", "See "))]
    return "; ".join(kept)
