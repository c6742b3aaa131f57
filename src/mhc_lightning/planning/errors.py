"""The error for a model or setting that cannot be planned."""

from mhc_lightning.errors import UserError


class NotPlannableError(UserError):
    """A part or a setting whose needs are unknown; a run with it may still work."""
