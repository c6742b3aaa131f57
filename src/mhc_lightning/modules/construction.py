"""How a network was constructed, as plain data, and networks constructed from such data."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from mhc_lightning.errors import UserError
from mhc_lightning.modules.connection import Connection
from mhc_lightning.modules.memory import Memory

PARTS = {"connection": Connection, "memory": Memory}
"""By argument of a network, the base of what builds a part of it."""

_SIZES = {  # what a network gives to its parts
    "connection": ("dim", "num_streams", "layer_index"),
    "memory": ("vocab_size", "model_dim", "num_layers", "num_streams", "norm_eps"),
}

UNKNOWN = "not_recorded"
"""In a record: why it does not rebuild its object."""

Sections = Mapping[str, Mapping[str, Any]]
"""The records of a network's sections by name: `model`, `connection`, `memory` if it has one."""

_Init = TypeVar("_Init", bound=Callable[..., None])


def recording(init: _Init) -> _Init:
    """An `__init__` that first notes the arguments of the class, as `construction`.

    The outermost one does: of a subclass, the subclass's own.
    """

    @functools.wraps(init)
    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        if "construction" not in vars(self):
            vars(self)["construction"] = _sections(type(self), init, (self, *args), kwargs)
        init(self, *args, **kwargs)

    return noting  # type: ignore[return-value]


def _sections(cls: type, init: Any, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    """The sections of a network that is constructed with these arguments of its `__init__`."""
    name = dotted_name(cls)
    try:
        bound = inspect.signature(init).bind(*args, **kwargs)
        bound.apply_defaults()
        _, *given = bound.arguments  # without the object itself
        values = {argument: bound.arguments[argument] for argument in given}
        for parameter in bound.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                values |= values.pop(parameter.name)
            elif parameter.kind is parameter.VAR_POSITIONAL and values.pop(parameter.name):
                raise TypeError(f"arguments *{parameter.name}")
        sections = {
            part: _factory(values.pop(part), _SIZES[part]) for part in PARTS if part in values
        }
        model = {"class": name, **plain(values)}
    except TypeError as error:
        return {"model": {"class": name, UNKNOWN: str(error)}}
    if sections.get("memory", {}).get("class") == dotted_name(Memory):
        del sections["memory"]
    return {"model": model, **sections}


def _factory(factory: Any, sizes: tuple[str, ...]) -> dict[str, Any]:
    """The record of a class or function, or of a `partial` of one: name and arguments.

    Defaults are written out, as a later version may have others. `sizes` are left out.

    Raises:
        TypeError: It has no name by which it is found, or an argument is no plain data.
    """
    function, given = factory, {}
    if isinstance(factory, partial):
        function, given = factory.func, factory.keywords
        # LightningCLI's parser has the class called for it.
        if function.__module__.startswith("jsonargparse.") and isinstance(factory.args[-1], type):
            function = factory.args[-1]
        elif factory.args:
            raise TypeError(f"{factory!r} has arguments without names")
    if not callable(function):
        raise TypeError(f"{factory!r} is no class or function")
    given = {name: value for name, value in given.items() if name not in sizes}
    defaults = {
        name: plain(parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty and name not in sizes
    }
    return {"class": dotted_name(function), **defaults, **plain(given)}


def dotted_name(thing: Any) -> str:
    """The shortest dotted name by which a class or function is found in a module.

    Raises:
        TypeError: It is local to a function, or a lambda.
    """
    name, module = getattr(thing, "__qualname__", "<"), getattr(thing, "__module__", None)
    if "<" in name or module is None:
        raise TypeError(f"{thing!r} has no name by which it could be found")
    steps = module.split(".")
    for k in range(1, len(steps)):
        package = ".".join(steps[:k])
        if vars(sys.modules.get(package, object)).get(name) is thing:
            return f"{package}.{name}"
    return f"{module}.{name}"


def plain(value: Any) -> Any:
    """A value as None, bool, int, float, str, and lists and dicts of these.

    Raises:
        TypeError: It is something else.
    """
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [plain(part) for part in value]
    raise TypeError(f"{value!r} is no plain data")


def construct(
    sections: Sections, source: str, find: Callable[[str, Any], Callable[..., Any]], kind: Any
) -> Any:
    """A network from the records of its sections.

    Args:
        sections: Records by name; see `Sections`.
        source: Name of what holds the records, for error messages.
        find: Gives the class or function of a dotted name, which a part of the given base, or a
            network, is made by. It refuses what must not be called.
        kind: The base of networks, or a union of several.

    Raises:
        UserError: A record is incomplete, or a class does not take the arguments.
    """
    for name, section in sections.items():
        if "class" not in section:
            raise UserError(f"{source} is incomplete: {name} names no class")
    parts = {
        name: partial(find(sections[name]["class"], base), **_arguments(sections[name]))
        for name, base in PARTS.items()
        if name in sections
    }
    model = sections["model"]
    model_class = find(model["class"], kind)
    try:
        return model_class(**parts, **_arguments(model))
    except TypeError as error:
        reason = str(error).partition("\n")[0]  # torch adds lines about its own code
        raise UserError(f"{source} does not fit this version: {reason}") from error


def _arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != "class"}
