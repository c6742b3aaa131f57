"""What composes with what: every cell of docs/composition.md, proved; the page, as the proofs say.

``WRITE_DOCS=1`` writes the page.
"""

import os
from pathlib import Path

import composing_callbacks  # noqa: F401  # its probes
import composing_connections  # noqa: F401
import composing_memory  # noqa: F401
import composing_transformer  # noqa: F401
import pytest
from composition import FEATURES, PARTS, PROBES, rendered_page

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("feature", FEATURES)
def test_each_cell_says_what_happens(feature: str, part: str) -> None:
    run, raises, _ = PROBES[feature, part]
    if raises is None:
        run()
    else:
        with pytest.raises(raises[0]) as caught:
            run()
        assert raises[1] in str(caught.value)


def test_the_page_is_made_of_the_probes(repository: Path) -> None:
    page = repository / "docs" / "composition.md"
    if os.environ.get("WRITE_DOCS"):
        page.write_text(rendered_page(), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == rendered_page()
