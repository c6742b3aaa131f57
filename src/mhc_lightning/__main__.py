"""`python -m mhc_lightning`: see `python -m mhc_lightning --help`."""

import gc
import sys

from mhc_lightning.cli import main as command_line

# Nothing of a user's own code, such as a logger, is left open by these.
_WRITES_AND_ENDS = ("plan", "inspect", "report", "generate")


def main() -> int:
    """Run the words of this process's command line and return its exit code.

    At its end Python goes through all objects once more for garbage, which takes half a second
    where torch is imported. The end of the process frees the same: after these commands it is left
    to it.
    """
    code = command_line.main()
    if sys.argv[1:2] and sys.argv[1] in _WRITES_AND_ENDS:
        gc.freeze()
    return code


if __name__ == "__main__":
    sys.exit(main())
