"""The folder of a report: `index.html`, `report.json`, and its figures as PNG files."""

import json
from pathlib import Path

from mhc_lightning.errors import UserError
from mhc_lightning.reporting.figures.inline_svg import png
from mhc_lightning.reporting.html_page import GENERATOR, render_page
from mhc_lightning.reporting.report import Report
from mhc_lightning.reporting.report_json import report_values

PAGE, NUMBERS, FIGURES = "index.html", "report.json", "figures"


def write_report(report: Report, folder: Path) -> Path:
    """Write a report, in place of an earlier one in the folder.

    Returns:
        The page.

    Raises:
        UserError: The folder holds a page that is not a report, or cannot be written to.
    """
    page = folder / PAGE
    try:
        if page.exists() and GENERATOR not in page.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{page} was not written by report; choose another output=DIR")
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        if page.exists():
            for earlier in (folder / FIGURES).glob("*.png"):
                earlier.unlink()
        page.write_text(render_page(report), encoding="utf-8")
        numbers = json.dumps(report_values(report), indent=2)
        (folder / NUMBERS).write_text(numbers + "\n", encoding="utf-8")
        for section in report.sections:
            for panel in section.panels:
                (folder / FIGURES / f"{panel.name}.png").write_bytes(png(panel.figure))
    except OSError as error:
        raise UserError(
            f"output={folder} cannot be written to: {error.strerror or error}; choose another"
        ) from error
    return page
