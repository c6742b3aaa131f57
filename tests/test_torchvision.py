"""A torchvision whose operators cannot load, played by packages of the same name."""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mhc_lightning import _torchvision


@pytest.fixture
def torchvision(tmp_path, monkeypatch):
    """Returns a function that imports a torchvision with the given source."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)

    def load(source: str):
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return importlib.import_module("torchvision")

    yield load
    sys.modules.pop("torchvision", None)


def test_missing_operators_are_declared_one_after_the_other(torchvision):
    module = torchvision("""
        import torch
        for operator in ("guard_first", "guard_second", "guard_third"):
            @torch.library.register_fake(f"torchvision::{operator}")
            def fake(boxes):
                return boxes
        complete = True
    """)
    assert module.complete


def test_a_declared_operator_has_no_kernel(torchvision):
    module = torchvision("""
        import torch
        @torch.library.register_fake("torchvision::guard_no_kernel")
        def fake():
            return None
    """)
    with pytest.raises(RuntimeError, match="guard_no_kernel"):
        module.torch.ops.torchvision.guard_no_kernel()


@pytest.mark.parametrize(
    "statement",
    [
        "raise RuntimeError('compiled with different CUDA major versions')",
        "raise RuntimeError('operator aten::nothing does not exist')",
        "raise ImportError('operator torchvision::nms does not exist')",
        "import torchvision.no_such_part",
    ],
)
def test_another_error_is_not_hidden(torchvision, statement):
    with pytest.raises((RuntimeError, ImportError)) as caught:
        torchvision(statement)
    assert "no_such_part" in statement or str(caught.value) in statement


def test_an_operator_that_stays_missing_is_reported(torchvision):
    with pytest.raises(RuntimeError, match="torchvision::guard_stays does not exist"):
        torchvision("raise RuntimeError('operator torchvision::guard_stays does not exist')")


def test_a_torchvision_that_loads_is_run_once_and_left_alone(torchvision):
    module = torchvision("""
        with open(__file__ + ".runs", "a") as runs:
            runs.write("run ")
    """)
    assert Path(module.__file__ + ".runs").read_text() == "run "
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert module.__spec__.name == "torchvision"


def test_installing_it_again_changes_nothing():
    before = list(sys.meta_path)
    _torchvision.install_guard()
    assert sys.meta_path == before
    assert sum(isinstance(f, _torchvision._TorchvisionFinder) for f in before) == 1


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()


def test_the_package_installs_it_without_importing_torch():
    finders = """
        import sys, mhc_lightning
        print("torch" in sys.modules, any("Torchvision" in type(f).__name__ for f in sys.meta_path))
    """
    assert run(finders) == "False True"


def test_importing_torch_installs_it_for_programs_that_know_nothing_of_this_package(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\ntorch.library.register_fake('torchvision::nms')(lambda boxes: boxes)\n"
    )
    # Lightning imports torchmetrics, and that imports torchvision.
    code = "import torch, torchvision; print(torchvision.torch is torch)"
    assert run(code, PYTHONPATH=str(tmp_path)) == "True"
