"""Checks values of settings against the types that these take.

OmegaConf's structured configs check types too, but their messages name neither the accepted values
nor a way to quote a text, and they need a dataclass per class that a configuration can name.
"""

import collections.abc
import inspect
import math
import types
import typing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mhc_lightning.errors import UserError

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}

# Settings whose default is of one of several types that they take.
_SEVERAL_TYPES = frozenset({"trainer.devices", "trainer.limit_val_batches"})
_ALSO_LISTS = frozenset({"memory.rows"})


def check_overridden_values(before: DictConfig, after: DictConfig, keys: list[str]) -> None:
    """Check overridden values against the type of the value they replace.

    A number without a fraction, such as 1e3, is taken for a whole number (`after` is changed).

    Raises:
        UserError: names the key, the value and the expected type.
    """
    for key in keys:
        default = OmegaConf.select(before, key, throw_on_missing=False)
        value = OmegaConf.select(after, key, throw_on_missing=False)
        if default is None or value is None or key in _SEVERAL_TYPES:
            continue
        if OmegaConf.is_config(default):
            if OmegaConf.is_dict(default) and not OmegaConf.is_config(value):
                raise UserError(f"{key} is a section, not a single value; set {key}.NAME=VALUE")
            continue
        kind = type(default)
        if OmegaConf.is_list(value) and key in _ALSO_LISTS:
            continue
        if OmegaConf.is_config(value):
            raise _wrong_type(key, OmegaConf.to_container(value), _NAMES.get(kind, kind.__name__))
        if kind is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            OmegaConf.update(after, key, int(value))
        elif kind is not str and not _matches(value, kind):
            raise _wrong_type(key, value, _NAMES.get(kind, kind.__name__))


def check_arguments(section: str, target: Any, arguments: dict[str, Any]) -> None:
    """Check a section's values against the annotations of what it configures.

    Args:
        section: Name of the section, for messages.
        target: The class or function that takes them.
        arguments: Values by parameter; parameters annotated with other than plain types are not
            looked at.

    Raises:
        UserError: a value of the wrong type, or one that `target` has no parameter for.
    """
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # of something built in, which does not say what it takes
        return
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):
        hints = {}  # an annotation that exists for type checkers only
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name not in parameters:
            if not takes_any:
                raise UserError(
                    f"unknown key '{section}.{name}'; {section} takes: {', '.join(parameters)}"
                )
        elif name in hints and not _matches(value, hints[name]):
            raise _wrong_type(f"{section}.{name}", value, describe_type(hints[name]))


def _wrong_type(key: str, value: Any, expected: str) -> UserError:
    shown = "null" if value is None else repr(value)
    kind = _kind(value)
    if (
        _NAMES[int] in expected
        and isinstance(value, int | float)
        and 2**53 <= abs(value) < math.inf
    ):
        kind = "too large"
    quote = ""
    if _NAMES[str] in expected and isinstance(value, int | float):
        quote = f"; as a text it stands between quotes: {key}='\"{value}\"'"
    return UserError(f"{key} must be {expected}, not {shown} ({kind}){quote}")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return _NAMES.get(type(value), type(value).__name__)


def _matches(value: Any, kind: Any) -> bool:
    """True if `value` fits an annotation, or if the annotation is none that is checked here."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(kind))
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if kind is None or kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str)
    if origin in (list, tuple, collections.abc.Sequence):
        return isinstance(value, collections.abc.Sequence) and not isinstance(value, str)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, collections.abc.Mapping)
    return True


def describe_type(kind: Any) -> str:
    """A type in words, as in `a whole number or null`."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = [describe_type(option) for option in typing.get_args(kind)]
        return " or ".join(dict.fromkeys(options))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if kind is type(None):
        return "null"
    if kind is Path:
        return _NAMES[str]
    if origin in (list, tuple, collections.abc.Sequence):
        return "a list"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))
