"""The error for what this room knows nothing about."""

from mhc_lightning.errors import UserError


class NotPlannableError(UserError):
    """A part or a setting whose needs are not known; a run of it may be all right."""
