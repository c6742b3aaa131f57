"""The peak memory of this process, as the operating system counts it; without other imports."""

import contextlib
import sys
from pathlib import Path


def peak_resident_bytes() -> int | None:
    """The largest resident memory so far, in bytes; None where the system does not report it."""
    # Linux's ru_maxrss also counts the program that started this one.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
