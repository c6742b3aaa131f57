"""Let everything else work beside a torchvision whose compiled operators cannot load.

litdata requires torchvision, and the build that a package index serves by default is linked
against a CUDA torch. Beside a CPU torch its shared library does not load; torchvision carries on
without it until it registers a shape function for an operator that this library would have
defined, and then ``import torchvision`` raises ``operator torchvision::nms does not exist``.
torchmetrics imports torchvision wherever it is installed, and Lightning imports torchmetrics, so a
library that nothing here uses stops the whole program.

torchvision can do without its operators: each function that needs one checks for it and says so.
It is enough, then, to declare the operators it names, so that its import comes to an end.
"""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MISSING_OPERATOR = re.compile(r"operator torchvision::(\w+) does not exist")
_libraries: list[Any] = []  # torch forgets a declaration when the Library that made it is freed


def _execute(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Run torchvision's own ``__init__``, declaring each operator it misses.

    Raises:
        RuntimeError: Whatever torchvision raised, unless it was a missing operator.
    """
    declared: set[str] = set()
    while True:
        try:
            return exec_module(module)
        except RuntimeError as error:
            missing = _MISSING_OPERATOR.search(str(error))
            if missing is None or missing[1] in declared:
                raise
            import torch

            # The signature does not matter: with no kernel behind it, it is never called.
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}() -> ()")
            _libraries.append(library)
            declared.add(missing[1])


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


def install_guard() -> None:
    """Arrange that a later ``import torchvision``, by whomever, survives missing operators.

    Costs one entry in ``sys.meta_path``: torch and torchvision are not imported here, and a
    torchvision that loads, or is absent, behaves exactly as it would otherwise. Calling it again
    changes nothing.
    """
    if not any(isinstance(finder, _TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())
