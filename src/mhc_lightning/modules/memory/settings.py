"""Checks of the settings that memories take."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, get_args

from mhc_lightning.errors import UserError

Placement = Literal["device", "sharded", "host"]


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """The value of `memory.<name>`.

    Raises:
        UserError: It is no whole number from `least` to `most`.
    """
    if not _is_whole(value, least, most):
        shown = "null" if value is None else repr(value)
        raise UserError(f"memory.{name} must be a whole number from {least} to {most}, not {shown}")
    return int(value)


def whole_numbers(name: str, values: Any, least: int, most: int) -> tuple[int, ...]:
    """The values of `memory.<name>`, a list.

    Raises:
        UserError: They are no whole numbers from `least` to `most`, at least one.
    """
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not values or not all(_is_whole(value, least, most) for value in values):
        shown = list(values) if is_list else values
        raise UserError(
            f"memory.{name} must be whole numbers from {least} to {most}, at least one, in"
            f" brackets, not {shown}"
        )
    return tuple(int(value) for value in values)


def check_reading(pad_token: int | None, placement: str, vocab_size: int) -> None:
    """Check `memory.pad_token` and `memory.placement`.

    Raises:
        UserError: The network has no such token, or there is no such placement.
    """
    if pad_token is not None:
        whole_number("pad_token", pad_token, 0, vocab_size - 1)
    if placement not in get_args(Placement):
        raise UserError(
            f"memory.placement must be one of {', '.join(get_args(Placement))}, not {placement!r}"
        )


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most  # type: ignore[operator]
