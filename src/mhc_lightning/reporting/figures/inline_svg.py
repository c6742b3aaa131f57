"""Matplotlib figures as SVG inside a page that is light or dark, and as PNG."""

import html
import io
import re
from typing import TYPE_CHECKING

from mhc_lightning.plotting.theme import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def inline_svg(figure: "Figure", name: str, title: str, description: str) -> str:
    """An `<svg>` element without outside references, in the colours and font of its page.

    Every colour of `COLOURS` becomes the CSS variable of that name, so that one drawing serves
    light and dark pages. Text stays text, not outlines.

    Args:
        figure: The figure.
        name: A prefix for every id, so that ids of one page differ.
        title: Short name, for readers who do not see the figure.
        description: The figure in words, likewise.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    for variable, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{variable})")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r"font: (?:(\w+) )?([\d.]+px) [^;\"]*", _font, text)  # before matplotlib 3.11
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    head = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title'
        f' {name}-about"><title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-about">{html.escape(description)}</desc>'
    )
    return head + text[text.index(">") + 1 :].strip()


def _font(match: re.Match[str]) -> str:
    weight = f"; font-weight: {match[1]}" if match[1] else ""
    return f"font-size: {match[2]}{weight}"


def png(figure: "Figure") -> bytes:
    """The figure on white, for papers and README files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()
