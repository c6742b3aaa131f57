"""No page may load a script, style or picture from elsewhere: a warning, which fails the build."""

import logging
import re
from typing import Any

from mkdocs.structure.pages import Page

_LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=\"(?:https?:)?//[^\"]*\""
    r"|<link\b(?=[^>]*rel=\"(?:stylesheet|preconnect|preload|icon)\")[^>]*href=\"(?:https?:)?//[^\"]*\""
)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Name what a page would fetch."""
    for found in _LOADED.finditer(output):
        logging.getLogger("mkdocs.offline").warning(
            "%s loads from elsewhere: %s", page.file.src_uri, found[0]
        )
    return output
