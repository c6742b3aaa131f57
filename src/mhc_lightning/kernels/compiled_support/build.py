"""Builds the CPU kernels with the machine's C++ compiler, once, into torch's extension cache."""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

_KERNELS = Path(__file__).resolve().parents[1]
_SECONDS = "10 to 20"  # on two cores and on one
_TIMEOUT = 900
# The instructions that torch itself has found the processor to have.
_INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}


class BuildError(Exception):
    """The kernels could not be built; the message says why and what to do."""


def built_library() -> Path:
    """The shared library of this version's kernels for this processor, built if it is not there.

    Several processes may call this at once: one builds, the others wait for it.

    Raises:
        BuildError: There is no compiler, it fails, or the cache cannot be written.
    """
    if sys.platform != "linux":
        raise BuildError("the CPU kernels are built on Linux alone")
    folder = _cache() / f"mhc_lightning_kernels_{_key()}"
    library = folder / "kernels.so"
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not library.is_file():
                _build(folder, library)
    except (OSError, NotImplementedError) as error:
        raise BuildError(
            f"the CPU kernels cannot be kept in {folder} ({error}); name a folder that can be"
            " written in TORCH_EXTENSIONS_DIR"
        ) from error
    return library


def _build(folder: Path, library: Path) -> None:
    print(
        f"compiling CPU kernels once, about {_SECONDS} s (kept in {folder})",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        sources = sorted(_KERNELS.glob("*/compiled.cpp"))
        objects = [scratch / f"{source.parent.name}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(_compile, "-c", str(source), "-o", str(made))
                for source, made in zip(sources, objects, strict=True)
            ]
            for job in jobs:
                job.result()
        linked = scratch / "kernels.so"
        _compile("-shared", *map(str, objects), *_openmp_of_torch(), "-o", str(linked))
        os.replace(linked, library)  # whole or not at all


def _compile(*arguments: str) -> None:
    command = [*_compiler(), *_flags(), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT
        )
    except FileNotFoundError as error:
        raise BuildError(
            f"there is no C++ compiler {command[0]!r}: install g++, or name one in CXX"
        ) from error
    except (subprocess.TimeoutExpired, PermissionError) as error:
        raise BuildError(f"the C++ compiler {command[0]!r} fails ({error})") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        cause = next((line for line in lines if "error" in line), lines[-1])
        raise BuildError(
            f"the C++ compiler {command[0]!r} fails ({' '.join(cause.split())[:200]}): mend it, or"
            " name another one in CXX"
        )


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def _flags() -> list[str]:
    machine = _INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())
    return [
        *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility-inlines-hidden"),
        *("-w", f"-I{_KERNELS}", *machine),
    ]


def _openmp_of_torch() -> Iterator[str]:
    """Torch's own OpenMP, if it ships one under a name of its own: one pool of threads for both."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        yield str(path)


def _cache() -> Path:
    """The folder that `torch.utils.cpp_extension` keeps extensions in."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "torch_extensions"


def _key() -> str:
    """Of all that decides what the library is: sources, flags, compiler, torch, machine."""
    found = hashlib.sha256()
    for source in sorted([*_KERNELS.glob("*/*.h"), *_KERNELS.glob("*/*.cpp")]):
        found.update(source.relative_to(_KERNELS).as_posix().encode() + b"\0")
        found.update(source.read_bytes())
    flags = [flag for flag in _flags() if not flag.startswith("-I")]
    for part in (*flags, *_compiler(), torch.__version__, platform.machine(), platform.libc_ver()):
        found.update(str(part).encode() + b"\0")
    return found.hexdigest()[:16]
