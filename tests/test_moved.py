"""Old names of modules and classes that were renamed."""

import importlib
import sys

import pytest
from hydra.utils import get_class

import mhc_lightning.optimizers
from mhc_lightning._moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_is_the_new_module_and_says_so(old: str, new: str) -> None:
    sys.modules.pop(f"mhc_lightning.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"{old} is now mhc_lightning\.{new}"):
        module = importlib.import_module(f"mhc_lightning.{old}")
    assert module is importlib.import_module(f"mhc_lightning.{new}")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("optimizers.AdamW", "optimizers.AdamWRecipe"),
        ("optimizers.Muon", "optimizers.MuonRecipe"),
        ("optimization.AdamW", "optimizers.recipes.AdamWRecipe"),  # in saved config.yaml files
        ("optimization.Muon", "optimizers.recipes.MuonRecipe"),
    ],
)
def test_an_old_class_name_is_the_new_class_and_says_so(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"{old.rpartition('.')[2]} is now .*{new}"):
        found = get_class(f"mhc_lightning.{old}")
    assert found is get_class(f"mhc_lightning.{new}")


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match="never_was"):
        importlib.import_module("mhc_lightning.never_was")
    with pytest.raises(AttributeError, match=r"optimizers' has no attribute 'Lion'"):
        mhc_lightning.optimizers.Lion  # noqa: B018
