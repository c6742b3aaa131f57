"""What the code imports is what `pyproject.toml` declares, no less and no more."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Where the dependencies of an extra may be imported, beside those that are always there.
EXTRAS = {
    "src/mhc_lightning/data/conversation_tokenizer.py": "huggingface",
    "src/mhc_lightning/data/formats/arrow_tables.py": "formats",
    "src/mhc_lightning/data/formats/web_archives.py": "formats",
    "src/mhc_lightning/data/hub_datasets.py": "datasets",
    "src/mhc_lightning/data/token_data/arrow_rows.py": "formats",
    "src/mhc_lightning/cli/evaluate.py": "evaluate",
    "src/mhc_lightning/evaluation": "evaluate",
    "src/mhc_lightning/data/tokenizer_sources.py": "huggingface",
    "src/mhc_lightning/huggingface": "huggingface",
    "src/mhc_lightning/upcycling": "huggingface",
    "recipes/shared/sweep.py": "slurm",
    "benchmarks": "dev",
    "docs": "docs",
    "examples": "dev",
    "tests": "dev",
    "tests/data/token_data": "datasets",
}
FOLDERS = ("src", "recipes", "benchmarks", "docs", "examples", "tests")


@pytest.fixture(scope="module")
def project(repository) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


BROUGHT_BY = packages_distributions()


def distributions(module: str) -> set[str]:
    """The distributions that may have brought a module: several share a namespace."""
    top = module.partition(".")[0]
    if top == "google":
        return {"protobuf"} if module.startswith("google.protobuf") else {module}
    return {canonicalize_name(name) for name in BROUGHT_BY.get(top, [top])}


def imported_by(file: Path) -> set[str]:
    """Names of the modules that a file imports, at its top or anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


@pytest.fixture(scope="module")
def foreign(repository: Path) -> dict[str, set[str]]:
    """By file, what it imports that is neither Python's own nor of this repository."""
    files = [file for folder in FOLDERS for file in sorted((repository / folder).rglob("*.py"))]
    scripts = {file.stem for file in files if not file.is_relative_to(repository / "src")}
    own = {"mhc_lightning", *FOLDERS, *scripts}
    return {
        file.relative_to(repository).as_posix(): {
            module
            for module in imported_by(file)
            if (top := module.partition(".")[0]) not in sys.stdlib_module_names and top not in own
        }
        for file in files
    }


def test_everything_imported_is_declared(foreign, project):
    always = names(project["dependencies"])
    for file, modules in foreign.items():
        extras = [extra for place, extra in EXTRAS.items() if Path(file).is_relative_to(place)]
        allowed = always.union(*(names(project["optional-dependencies"][e]) for e in extras))
        for module in modules:
            assert distributions(module) & allowed, f"{file} imports {module}, not declared"


def test_everything_declared_is_imported_by_the_package(foreign, project):
    modules = {
        module for file, modules in foreign.items() if file.startswith("src/") for module in modules
    }
    used = set().union(*(distributions(module) for module in modules))
    assert names(project["dependencies"]) <= used


@pytest.mark.parametrize("extra", ["datasets", "evaluate", "formats", "huggingface", "slurm"])
def test_dev_holds_what_the_extras_need_or_it_comes_along(project, extra):
    dev = names(project["optional-dependencies"]["dev"])
    # lm_eval requires datasets.
    assert names(project["optional-dependencies"][extra]) - {"datasets"} <= dev
