"""Lower limits of the sizes that a model is built from."""

from mhc_lightning.errors import UserError


def require_at_least(**limits: tuple[float, float]) -> None:
    """Check settings of the config group `model`, given as `name=(value, lower limit)`.

    Raises:
        UserError: A value is below its limit, or NaN.
    """
    for name, (value, limit) in limits.items():
        if not value >= limit:  # true for NaN
            raise UserError(f"model.{name} must be at least {limit}, not {value}")
