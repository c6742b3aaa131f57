"""Exit codes of the command line; all processes of a run end with the same one."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit code of a command.

    Attributes:
        OK: Done, also if a fault was recovered from, or nobody reads the output any further.
        BUG: An error of the program, with its traceback.
        USER_ERROR: A mistake that the user can fix.
        NON_FINITE: The loss, a gradient or a weight became NaN or infinite.
        RUN_FAULT: The machine ended the run: a process died, hung, was cut off or ran out of
            memory.
        INTERRUPTED: Interrupted from the keyboard (128 + SIGINT).
        TERMINATED: Stopped by SIGTERM (128 + SIGTERM), after saving.
    """

    OK = 0
    BUG = 1
    USER_ERROR = 2
    NON_FINITE = 3
    RUN_FAULT = 4
    INTERRUPTED = 130
    TERMINATED = 143

    @classmethod
    def is_explained(cls, code: int) -> bool:
        """True for the code of a process that has said in one line why it ended."""
        return code in set(cls) - {cls.OK, cls.BUG}
