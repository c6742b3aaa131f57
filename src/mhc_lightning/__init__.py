"""Hyper-Connections and mHC for PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

from mhc_lightning._moved import keep_old_names
from mhc_lightning._torchvision import explain_failures

if TYPE_CHECKING:
    from mhc_lightning.data import TextDataModule
    from mhc_lightning.language_model import LanguageModel

__version__ = "0.1.0"
__all__ = ["LanguageModel", "TextDataModule"]

keep_old_names()
explain_failures()  # before anything here imports Lightning

# Loaded at first use: they import Lightning, which takes seconds.
_HOMES = {
    "LanguageModel": "mhc_lightning.language_model",
    "TextDataModule": "mhc_lightning.data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
