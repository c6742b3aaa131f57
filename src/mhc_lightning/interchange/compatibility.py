"""Whether the tensors that are there are those that are wanted, and plain weights."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from mhc_lightning.errors import UserError

_SHOWN = 8  # of each kind; the rest is counted


def check_tensors(
    found: Mapping[str, Iterable[int]], wanted: Mapping[str, Tensor], where: str, hint: str = ""
) -> None:
    """Compare names and shapes.

    Args:
        found: Shapes by name.
        wanted: A state dict, on any device.
        where: What holds them, for the message.
        hint: How to mend it, for the message.

    Raises:
        UserError: Names the tensors that are missing, left over or of another shape.
    """
    missing = [f"{name} {list(tensor.shape)}" for name, tensor in wanted.items()
               if name not in found]  # fmt: skip
    extra = [f"{name} {list(shape)}" for name, shape in found.items() if name not in wanted]
    misshapen = [
        f"{name} is {list(found[name])}, not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and list(found[name]) != list(tensor.shape)
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
        raise UserError(f"the tensors of {where} are not those of the model; {'; '.join(faults)}")


def is_weight(value: object) -> bool:
    """Whether a value is a tensor of plain weights: numbers with a fraction, of 16 bits or more.

    Quantised weights are not: integers and floats of 8 bits, of which other tensors tell the scale.
    """
    return isinstance(value, Tensor) and value.is_floating_point() and value.itemsize > 1


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
