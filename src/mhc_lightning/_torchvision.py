"""Explains the error of a torchvision that cannot load, which keeps Lightning from loading.

litdata requires torchvision, and the build that a package index serves by default is linked
against a CUDA torch. Beside a CPU torch, or beside a torch of another version, its import fails
with an error such as `operator torchvision::nms does not exist`. torchmetrics imports
torchvision wherever it is installed, and Lightning imports torchmetrics. So the user meets this
error, under the frames of four libraries, at the first use of this package.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from mhc_lightning.errors import UserError


class BrokenTorchvisionError(UserError, ImportError):
    """An installed torchvision cannot be imported; the message says how to fix it."""


def _named(distribution: str) -> str:
    from importlib import (
        metadata,
    )  # here: every program that imports this package would wait for it

    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return distribution


def _execute(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Run torchvision's own `__init__`.

    Raises:
        BrokenTorchvisionError: The import fails; raised from the error of the import.
    """
    try:
        exec_module(module)
    except Exception as error:
        raise BrokenTorchvisionError(
            f"{_named('torchvision')} cannot be imported beside {_named('torch')}"
            f" ({type(error).__name__}: {error}), and Lightning imports it where it is installed."
            " Nothing in mhc-lightning needs it: uninstall it (pip uninstall torchvision), or"
            " install the torchvision that belongs to this torch, from the index it came from"
        ) from error


class _TorchvisionFinder(MetaPathFinder):
    """Finds torchvision as usual, and has it loaded by `_execute`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            # On this one loader, so that the module keeps the loader and the spec it would have.
            plain = spec.loader.exec_module
            setattr(spec.loader, "exec_module", functools.partial(_execute, plain))  # noqa: B010
        return spec


def explain_failures() -> None:
    """Make a failing `import torchvision` in this process say how to fix it.

    The cost is one entry in `sys.meta_path`. This function imports neither torch nor torchvision. A
    torchvision that loads, or is absent, behaves exactly as it would otherwise. A second call
    changes nothing.
    """
    if not any(isinstance(finder, _TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())
