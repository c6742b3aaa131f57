"""Old names of modules that were renamed."""

import importlib
import sys

import pytest

from mhc_lightning._moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_is_the_new_module_and_says_so(old: str, new: str) -> None:
    sys.modules.pop(f"mhc_lightning.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"{old} is now mhc_lightning\.{new}"):
        module = importlib.import_module(f"mhc_lightning.{old}")
    assert module is importlib.import_module(f"mhc_lightning.{new}")


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match="never_was"):
        importlib.import_module("mhc_lightning.never_was")
