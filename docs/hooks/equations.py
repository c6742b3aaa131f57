"""Equations become MathML when the site is built: pages need no script and no font for them.

Pages write `$…$` and `$$…$$`, as code hosts show it; the extension `arithmatex` finds them.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """MathML in place of LaTeX."""
    content = _BLOCK.sub(lambda found: _shown(found[1], display="block"), content)
    return _INLINE.sub(lambda found: _shown(found[1], display="inline"), content)


def _shown(source: str, display: str) -> str:
    tag = "div" if display == "block" else "span"
    return f'<{tag} class="arithmatex">{convert(html.unescape(source), display=display)}</{tag}>'
