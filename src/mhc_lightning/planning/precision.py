"""Sizes in bytes of parameters and activations under a trainer's precision setting."""

from typing import NamedTuple

import torch

from mhc_lightning.planning.errors import NotPlannableError

# Lightning's names, with the aliases it takes: bytes of a parameter, bytes of an activation.
_SIZES = {
    **dict.fromkeys(("32-true", "32", "None"), (4, 4)),
    **dict.fromkeys(("64-true", "64"), (8, 8)),
    **dict.fromkeys(("bf16-mixed", "bf16"), (4, 2)),
    **dict.fromkeys(("bf16-true", "16-true"), (2, 2)),
}
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


class Precision(NamedTuple):
    """Sizes in bytes that follow from a precision setting.

    Attributes:
        weight: One parameter, its gradient, and each of the optimizer's numbers for it.
        activation: One value of the streams or of a sub-layer's tensors.
    """

    weight: int
    activation: int

    @property
    def coefficient(self) -> int:
        """Size of a connection's parameters and coefficients, and of sums: at least float32."""
        return max(4, self.weight)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of parameters; those of connections are at least float32."""
        return _DTYPES[self.weight]

    @property
    def activation_dtype(self) -> torch.dtype:
        """Type of the streams and of the tensors of sub-layers."""
        return _DTYPES[self.activation]

    @property
    def is_mixed(self) -> bool:
        """True if products run on copies of the weights in a lower precision."""
        return self.weight != self.activation


def precision_of(setting: str | int | None) -> Precision:
    """The sizes that `trainer.precision` stands for.

    Raises:
        NotPlannableError: The setting cannot be planned.
    """
    sizes = _SIZES.get(str(setting))
    if sizes is None:
        raise NotPlannableError(
            f"trainer.precision={setting} cannot be planned for; use one of {', '.join(_SIZES)}"
        )
    return Precision(*sizes)
