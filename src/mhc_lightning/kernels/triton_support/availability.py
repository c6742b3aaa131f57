"""Availability of Triton on this machine: the cause where it does not work, and the fix."""

import importlib.util
import subprocess
import sys
import sysconfig
from functools import cache
from importlib import metadata
from pathlib import Path

import torch


@cache
def trouble_with_triton(device: torch.device) -> str | None:
    """The reason why Triton's kernels cannot run on a device, and the fix; None if they can.

    The function imports the kernels and launches a small one. Most faults show only in a launch:
    Triton builds its launcher with the machine's C compiler and Python's headers, and loads the
    driver.

    Returns:
        One line, such as `"Triton is not installed: pip install triton"`.
    """
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: pip install {_requirement()}"
    try:
        from mhc_lightning.kernels.triton_support.probe import launch_something

        launch_something(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an installation can be broken in any way
        cause, fix = _diagnosis(error)
        return f"Triton does not work here ({cause}): {fix}"
    return None


def _diagnosis(error: Exception) -> tuple[str, str]:
    """The cause in a few words, and the fix."""
    text = " ".join(str(error).split())
    if isinstance(error, subprocess.CalledProcessError):
        command = error.cmd[0] if isinstance(error.cmd, list) else error.cmd
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
            return "Python.h is missing", f"install this Python's headers, such as {package}"
        return f"{command} failed", "fix this C compiler, or name another one in CC"
    if "C compiler" in text:
        return "there is no C compiler", "install gcc, or name a compiler in CC"
    if "libcuda" in text:
        fix = "install NVIDIA's driver, or say in TRITON_LIBCUDA_PATH where its libcuda.so.1 is"
        return "it does not find libcuda.so", fix
    if text.startswith("0 active drivers"):
        return "it finds no driver of a GPU", "install NVIDIA's, or AMD's"
    if "active drivers" in text:
        return text[:200], "name the one to use in TRITON_DEFAULT_BACKEND, nvidia or amd"
    cause = f"{type(error).__name__}: {text[:200]}"
    return cause, f"pip install --force-reinstall {_requirement()}"


def _requirement() -> str:
    """The version of Triton that this torch requires."""
    try:
        asked = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        asked = []
    triton = (line.split(";")[0].strip() for line in asked if line.startswith("triton"))
    return next(triton, "triton")
