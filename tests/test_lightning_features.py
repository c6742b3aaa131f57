"""Lightning's features with this package's modules: every row of the page, proved.

``WRITE_DOCS=1`` writes the page.
"""

import os
from pathlib import Path

import lightning_callbacks  # noqa: F401  # its probes
import lightning_loops  # noqa: F401
import lightning_trainers  # noqa: F401
import pytest
from lightning_features import PROBES, rendered_page

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [
    pytest.param(*row, id=row[1], marks=[pytest.mark.slow] if found.slow else [])
    for row, found in PROBES.items()
]


@pytest.mark.parametrize(("section", "feature"), ROWS)
def test_each_row_says_what_happens(
    section: str, feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, raises, _, _ = PROBES[section, feature]
    if raises is None:
        run()
    else:
        with pytest.raises(raises[0]) as caught:
            run()
        assert raises[1] in str(caught.value)


def test_the_page_is_made_of_the_probes(repository: Path) -> None:
    page = repository / "docs" / "your_project" / "lightning_features.md"
    if os.environ.get("WRITE_DOCS"):
        page.write_text(rendered_page(), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == rendered_page()
