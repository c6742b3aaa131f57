"""Errors for which the command line prints one line, each with its own exit code."""

import errno
from collections.abc import Mapping

from mhc_lightning.exit_codes import ExitCode


class UserError(Exception):
    """A mistake the user can fix; the message says what is wrong, where, and how (exit code 2)."""

    exit_code = ExitCode.USER_ERROR


class RunFaultError(Exception):
    """A process of the run died, hung, was cut off or failed; the others end with it.

    Attributes:
        exit_code: The exit code of the run: 4, or that of the failure in another process.
        printed: True if standard error shows the text already.
    """

    def __init__(
        self, text: str, exit_code: int = ExitCode.RUN_FAULT, *, printed: bool = False
    ) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.printed = printed


class NonFiniteLossError(Exception):
    """The loss, a gradient or a weight to be saved became NaN or infinite (exit code 3).

    The error is raised before the optimizer step, or before a checkpoint is written.

    Attributes:
        what: The event: "the loss became NaN".
        step: The optimizer step that was being computed, or was to be saved (first 1).
        gains: The last measured Amax gains, by TensorBoard tag; empty if none were measured.
    """

    exit_code = ExitCode.NON_FINITE

    def __init__(self, what: str, step: int, gains: Mapping[str, float] | None = None) -> None:
        self.what = what
        self.step = step
        self.gains = dict(gains or {})
        gains_text = ", ".join(f"{tag} {value:.4g}" for tag, value in self.gains.items())
        super().__init__(
            f"{what} at step {step}"
            f" (last gains: {gains_text or 'none measured'});"
            " try a lower optimizer.lr, a longer optimizer.warmup_steps or"
            " a smaller trainer.gradient_clip_val, and resume from the last checkpoint"
        )


def one_line_message(error: BaseException) -> str:
    """An exception's message in one line, without the traceback of a data-loading process."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.rstrip().splitlines()[-1].partition(": ")[2] or text
    return " ".join(text.split())


def full_disk_message(error: BaseException) -> str | None:
    """The message and its remedy if an exception means a full disk or quota, else None."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{where}; make room there, and resume with ckpt_path=last"
