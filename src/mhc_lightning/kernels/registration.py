"""Registers operators with torch: schema and shape function; a forward-mode derivative raises.

A body is written once. In its annotations a NamedTuple stands for its fields, one argument each, so
that long lists of operands have one definition. The body is also its shape function: on tensors
without numbers (fake or meta), `implementation` gives the reference.
"""

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
}


def operator(name: str) -> Callable[[Callable], Any]:
    """Define an operator of this package, as `torch.library.custom_op` does.

    The body's annotations may name tensors, optional tensors, numbers, strings and NamedTuples of
    these. A None among its results becomes an empty tensor.

    Args:
        name: The operator's name in `torch.ops.mhc_lightning`.
    """

    def define(body: Callable) -> Any:
        hints = get_type_hints(body)
        results = hints.pop("return")
        parameters, groups = _parameters(hints), _groups(hints)

        def run(*arguments: Any) -> Any:
            outputs = body(
                *(
                    arguments[first] if make is None else make(arguments[first:last])
                    for make, first, last in groups
                )
            )
            if results is Tensor:
                return outputs
            empty = next(a for a in arguments if isinstance(a, Tensor)).new_empty
            return tuple(empty(0) if output is None else output for output in outputs)

        def run_without_tangents(*arguments: Any) -> Any:
            if forward_ad._current_level >= 0:
                raise NotImplementedError(
                    f"torch.ops.mhc_lightning.{name} has no forward-mode derivative: call the"
                    " function of mhc_lightning.kernels around it, which has one"
                )
            return run(*arguments)

        def shapes(*arguments: Any) -> Any:
            given = zip(parameters, arguments, strict=True)
            return run(*(1 if name == "num_iterations" else value for name, value in given))

        schema = ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in parameters.items())
        registered = torch.library.custom_op(
            f"mhc_lightning::{name}",
            run_without_tangents,
            mutates_args=(),
            schema=f"({schema}) -> {_results(results)}",
        )
        registered.register_fake(shapes)  # no number of iterations changes shapes
        return registered

    return define


def _fields(hint: Any) -> dict[str, Any] | None:
    """The annotations of a NamedTuple's fields, None for another type."""
    return get_type_hints(hint) if hasattr(hint, "_fields") else None


def _parameters(hints: dict[str, Any]) -> dict[str, Any]:
    """Names and annotations of the operator's flat arguments."""
    flat: dict[str, Any] = {}
    for name, hint in hints.items():
        fields = _fields(hint) or {name: hint}
        # `grads.pre` beside `operands.pre`: the second one gets the name of its argument too.
        flat |= {f"{name}_{field}" if field in flat else field: t for field, t in fields.items()}
    return flat


def _results(hint: Any) -> str:
    if hint is Tensor:
        return "Tensor"
    count = len(_fields(hint) or get_args(hint))
    return f"({', '.join(['Tensor'] * count)})"


def _groups(hints: dict[str, Any]) -> list[tuple[Callable | None, int, int]]:
    """For each argument of the body: its NamedTuple, if any, and its range of flat arguments."""
    groups, first = [], 0
    for hint in hints.values():
        last = first + len(_fields(hint) or [hint])
        groups.append((getattr(hint, "_make", None), first, last))
        first = last
    return groups
