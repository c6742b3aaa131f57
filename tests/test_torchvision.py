"""A torchvision that cannot load, played by packages of the same name."""

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mhc_lightning import _torchvision
from mhc_lightning.errors import UserError

MISSING_OPERATOR = (
    "import torch\ntorch.library.register_fake('torchvision::nms')(lambda boxes: 0)\n"
)


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


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (MISSING_OPERATOR, "RuntimeError: operator torchvision::nms does not exist"),
        (
            "raise RuntimeError('other CUDA major version')",
            "RuntimeError: other CUDA major version",
        ),
        ("import torchvision.no_such_part", "ModuleNotFoundError: No module named 'torchvision.no"),
        ("raise OSError('libcudart.so.13: no such file')", "OSError: libcudart.so.13"),
        ("import torchvision; torchvision.extension", "AttributeError: partially initialized"),
    ],
)
def test_the_error_says_what_failed_and_what_mends_it(torchvision, source, why):
    with pytest.raises(ImportError) as caught:
        torchvision(source)
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert why in message and "pip uninstall torchvision" in message
    assert "\n" not in message
    assert str(caught.value.__cause__) in message
    assert "torchvision" not in sys.modules


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
    _torchvision.explain_failures()
    assert sys.meta_path == before
    assert sum(isinstance(f, _torchvision._TorchvisionFinder) for f in before) == 1


@pytest.fixture
def program(tmp_path):
    """Returns a function that runs Python in an environment whose torchvision is broken."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(MISSING_OPERATOR)
    # For those who look for an installed torchvision before they import it, as torchmetrics does.
    metadata = tmp_path / "torchvision-9.8.7.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 9.8.7\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])

    def run(*words: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=tmp_path
        )

    return run


def test_a_command_ends_in_one_line(program):
    done = program("-m", "mhc_lightning", "fit", "--config", "mhc_quickstart")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: torchvision 9.8.7 cannot be imported beside torch 2.")
    assert "Traceback" not in done.stdout


def test_the_package_imports_no_torch_and_what_needs_no_lightning_runs(program):
    code = """
        import sys, mhc_lightning
        from mhc_lightning.cli.main import main
        main(["--version"])
        print({"torch", "torchvision", "lightning"} & {*sys.modules})
        import mhc_lightning.modules
    """
    done = program("-c", textwrap.dedent(code))
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["set()"]), done.stderr


def test_programs_that_do_not_import_the_package_know_nothing_of_it(program):
    code = "import sys, torch; print([m for m in sys.modules if m.startswith('mhc_lightning')])"
    done = program("-c", f"{code}; import torchvision")
    assert done.stdout.strip() == "[]"
    assert done.stderr.splitlines()[-1] == "RuntimeError: operator torchvision::nms does not exist"
