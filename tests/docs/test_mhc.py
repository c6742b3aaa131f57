"""The pages on what mHC is: their code, their pictures, and their numbers against the results."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from pages import follow

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted((DOCS / "mhc").glob("*.md"))


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The first table under a heading, by the name in its first column."""
    text = (DOCS / page).read_text(encoding="utf-8").split(f"\n### {heading}\n")[1]
    table = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert table
    cells = [line.strip("| ").split(" | ") for line in table[0].splitlines()[2:]]
    return {first.strip("`"): others for first, *others in cells}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_prints_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    follow(page, tmp_path)


def test_every_picture_is_drawn_and_shown(figures: ModuleType, tmp_path: Path) -> None:
    figures.draw(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    kept = {path.name for path in (DOCS / "mhc/figures").iterdir()} - {"run.json"}
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert drawn == kept == set(re.findall(r"\]\(figures/(\S+)\)", text))


def test_gains_in_the_text_are_those_of_the_two_networks() -> None:
    run = json.loads((DOCS / "mhc/figures/run.json").read_text(encoding="utf-8"))
    hc, mhc = (
        {tag.removeprefix("amax_gain/"): max(values) for tag, values in run[name]["gains"].items()}
        for name in ("hc", "mhc")
    )
    text = " ".join((DOCS / "mhc/index.md").read_text(encoding="utf-8").split())
    single = max(hc["single/forward"], hc["single/backward"])
    assert f"largest single-layer gain is {single:.2f}." in text
    shown = f"is {hc['composite/forward']:.0f} forward and {hc['composite/backward']:.0f} backward."
    assert shown in text
    shown = f"they are {mhc['composite/forward']:.2f} and {mhc['composite/backward']:.2f}."
    assert shown in text


def test_found_gains_and_losses_are_those_of_the_recipe() -> None:
    report = json.loads((REPOSITORY / "recipes/stability/results/cpu/report.json").read_text())
    runs = {run["name"]: run for run in report["runs"]}
    table = rows("mhc/findings.md", "Gains: as in the paper")
    assert len(table) == 5
    for name, (loss, *gains) in table.items():
        assert f"{runs[name]['validation_loss']['value']:.3f}" == loss
        for shown, direction in zip(gains, ("forward", "backward"), strict=True):
            value = runs[name]["gains"][f"amax_gain/composite/{direction}"]["largest"]["value"]
            digits = len(shown.partition(".")[2])
            assert f"{value:,.{digits}f}" == shown, (name, direction)


def test_found_learning_rates_are_those_of_the_recipe() -> None:
    recipe = (REPOSITORY / "recipes/stress/README.md").read_text(encoding="utf-8")
    for name, cells in rows(
        "mhc/findings.md", "Breaking: as in the paper, at larger learning rates"
    ).items():
        assert f"| `{name}` | {' | '.join(cells)} |" in recipe


def test_the_time_of_a_step_is_that_of_the_benchmark() -> None:
    text = " ".join((DOCS / "mhc/cost.md").read_text(encoding="utf-8").split())
    shown = re.search(r"([\d.]+) times as long .* at C = 256, and ([\d.]+) times at C = 128", text)
    assert shown
    results = json.loads((REPOSITORY / "benchmarks/results/training_step_cpu.json").read_text())
    for width, ratio in zip((256, 128), shown.groups(), strict=True):
        (row,) = (r for r in results["rows"] if r["dim"] == width and not r["compiled"])
        assert ratio == f"{row['ratio_to_residual']['mhc/kernels']:.2f}"
