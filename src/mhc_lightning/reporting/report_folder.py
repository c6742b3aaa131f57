"""Writes a report to a folder."""

import json
from pathlib import Path

from mhc_lightning.errors import UserError
from mhc_lightning.reporting.figures.inline_svg import png
from mhc_lightning.reporting.html_page import GENERATOR, page
from mhc_lightning.reporting.report import Report
from mhc_lightning.reporting.report_json import record

PAGE, NUMBERS, FIGURES = "index.html", "report.json", "figures"


def write_report(report: Report, folder: Path) -> Path:
    """Write ``index.html``, ``report.json`` and ``figures/*.png``, in place of an earlier report's.

    Returns:
        The page.

    Raises:
        UserError: The folder holds a page that is no report, or cannot be written to.
    """
    file = folder / PAGE
    try:
        if file.exists() and GENERATOR not in file.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{file} was not written by report; choose another output=DIR")
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        if file.exists():
            for old in (folder / FIGURES).glob("*.png"):
                old.unlink()
        file.write_text(page(report), encoding="utf-8")
        numbers = json.dumps(record(report), indent=2)
        (folder / NUMBERS).write_text(numbers + "\n", encoding="utf-8")
        for section in report.sections:
            for panel in section.panels:
                (folder / FIGURES / f"{panel.name}.png").write_bytes(png(panel.figure))
    except OSError as error:
        raise UserError(
            f"output={folder} cannot be written to: {error.strerror or error}; choose another"
        ) from error
    return file
