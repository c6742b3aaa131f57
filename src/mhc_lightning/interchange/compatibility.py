"""The checks that tensors fit a model: their names, shapes and types."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from mhc_lightning.errors import UserError

_SHOWN = 8  # names of each kind in a message; the others are counted


def check_tensors(
    shapes: Mapping[str, Iterable[int]],
    expected: Mapping[str, Tensor],
    source: str,
    hint: str = "",
) -> None:
    """Compare the names and shapes of tensors with those of a model.

    Args:
        shapes: Shapes by name.
        expected: The state dict of the model, on any device.
        source: Name of the file, folder or model that holds the tensors, for the message.
        hint: A way to fix the mismatch, for the message.

    Raises:
        UserError: Names the tensors that are missing, unexpected or of another shape.
    """
    missing = [
        f"{name} {list(tensor.shape)}" for name, tensor in expected.items() if name not in shapes
    ]
    extra = [f"{name} {list(shape)}" for name, shape in shapes.items() if name not in expected]
    misshapen = [
        f"{name} is {list(shapes[name])}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in shapes and list(shapes[name]) != list(tensor.shape)
    ]
    faults = [
        f"{kind}: {_listed(names)}"
        for kind, names in (
            ("missing", missing),
            ("not in the model", extra),
            ("of another shape", misshapen),
        )
        if names
    ]
    if faults:
        faults += [hint] if hint else []
        raise UserError(f"the tensors of {source} are not those of the model; {'; '.join(faults)}")


def is_weight(value: object) -> bool:
    """True if a value is a tensor of plain weights: floating-point, with 16 bits or more.

    Quantised weights are integers, or floats of 8 bits, whose scale is in other tensors.
    """
    return isinstance(value, Tensor) and value.is_floating_point() and value.itemsize > 1


def is_plain(value: object, expected: Tensor | None) -> bool:
    """True if a value is a weight, or a tensor of integers where the model has one, too."""
    if expected is None or expected.is_floating_point():
        return is_weight(value)
    return isinstance(value, Tensor) and value.dtype == expected.dtype


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
