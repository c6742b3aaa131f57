"""The wheel, its metadata, and the pins that are tested."""

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import mhc_lightning

SUFFIXES = (
    ".py",
    ".yaml",
    ".css",
    ".html",
    ".cpp",
    ".h",
)  # of the files that the package consists of


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, repository) -> zipfile.ZipFile:
    """The wheel, built from the source archive as a package index would."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    subprocess.run(command, cwd=repository, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def project(repository) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def constraints(repository) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_wheel_holds_the_package_and_its_configurations_and_nothing_else(wheel, repository):
    def below(folder: Path) -> set[str]:
        files = (file for file in folder.rglob("*") if file.is_file())
        return {str(f.relative_to(folder)) for f in files if f.suffix in SUFFIXES}

    expected = {f"mhc_lightning/{name}" for name in below(repository / "src/mhc_lightning")}
    expected |= {f"mhc_lightning/configs/{name}" for name in below(repository / "configs")}
    assert "mhc_lightning/configs/mhc_quickstart.yaml" in expected
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected | {"mhc_lightning/py.typed"}


def test_wheel_says_what_it_is(wheel, project):
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    fields = message_from_bytes(wheel.read(metadata))
    assert fields["Name"] == project["name"] == "mhc-lightning"
    assert fields["Version"] == mhc_lightning.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    (entry_points,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    # No other group: what is in them runs in programs that know nothing of this package.
    declared = ConfigParser()
    declared.read_string(wheel.read(entry_points).decode())
    scripts = {"mhc-lightning": "mhc_lightning.__main__:main"}
    assert {name: dict(declared[name]) for name in declared.sections()} == {
        "console_scripts": scripts
    }


def test_malicious_releases_of_lightning_are_excluded(project):
    (lightning,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "lightning")
    assert "2.6.4" in lightning.specifier
    assert not {"2.6.2", "2.6.3"} & set(lightning.specifier.filter(["2.6.2", "2.6.3"]))


def test_constraints_pin_every_dependency_within_what_the_project_allows(project, constraints):
    extras = project["optional-dependencies"]
    for text in project["dependencies"] + extras["dev"] + extras["docs"]:
        requirement = Requirement(text)
        pinned = constraints[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), text


def test_constraints_fit_cpu_and_gpu_builds(constraints):
    for name, version in constraints.items():
        assert not name.startswith(("nvidia", "cuda")), name
        assert Version(version).local is None, name
    # torch pins torchvision's version and, in its CUDA build, Triton's.
    assert constraints["torch"] == "2.13.0"
    assert constraints["torchvision"] == "0.28.0"
    assert constraints["triton"] == "3.7.1"


def test_the_changelog_knows_this_version_or_is_ahead_of_it(repository):
    headings = re.findall(r"^## \[(.*?)\]", (repository / "CHANGELOG.md").read_text(), re.M)
    assert headings and headings[0] in ("Unreleased", mhc_lightning.__version__)


@pytest.mark.slow
def test_wheel_installs_elsewhere_and_trains(
    tmp_path, copy_of_repository, commands_in, constraints
):
    elsewhere = tmp_path / "elsewhere"
    venv.create(elsewhere / "venv", with_pip=True)
    python = elsewhere / "venv/bin/python"
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }

    def run(*command: str, cwd: Path = elsewhere) -> str:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run("python", "-m", "pip", "install", f"torch=={constraints['torch']}")
    show_torch = "import torch; print(torch.__version__, torch.__file__)"
    before = run("python", "-c", show_torch)

    sequence = commands_in("docs/start/install.md", "As a package")
    assert sequence[0] == "make wheel"  # in an environment of its own; the tests' will do
    subprocess.run([sys.executable, "-m", "build"], cwd=copy_of_repository, check=True)
    for line in sequence[1:]:
        run("bash", "-c", line, cwd=copy_of_repository)

    assert run("python", "-c", show_torch) == before
    # Whatever torchvision came along, also where nothing has imported this package before.
    run("python", "-c", "import lightning, torchmetrics, litdata, mhc_lightning")
    home = run("python", "-c", "import mhc_lightning as m; print(m.__path__[0])").strip()
    assert home.startswith(str(elsewhere)) and (Path(home) / "py.typed").exists()

    (elsewhere / "texts").mkdir()
    for number in range(40):
        (elsewhere / "texts" / f"{number}.txt").write_text(f"{number} bottles on the wall\n" * 50)
    command = ["python", "-m", "mhc_lightning"]
    quickstart = ["--config", "mhc_quickstart", "data.path=data/mine"]
    validation = "prepare.validation_fraction=0.2"
    run(*command, "prepare", *quickstart, "input=texts", "output=data/mine", validation)
    tiny = ["model.dim=32", "model.num_layers=1", "trainer.max_steps=3", "output_dir=run"]
    tiny += ["data.sequence_length=32", "data.batch_size=2", "trainer.log_every_n_steps=1"]
    run(*command, "fit", *quickstart, *tiny)
    assert len((elsewhere / "run/metrics.csv").read_text().splitlines()) == 1 + 3
