"""Files of the repository become pages of the site wherever a page links to them.

A link such as `../../recipes/stability/README.md` leads out of `docs/`, and works where the
repository is read. For the site, each file that is linked to becomes a page at its own path: a
Markdown file as it is, a source file as a block of code, a folder as a list of its entries.
Pictures are copied from where they lie.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = "docs"

# Markdown links and pictures outside code, and the addresses of HTML pictures.
_CODE = re.compile(r"(^ *(`{3,}|~{3,}).*?^ *\2 *$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)|(?<=src=\")(?!\w+:)([^\"]+)")
_PAGES = {"README.md": "index.md", "recipes/README.md": "recipes/index.md"}
_SOURCE = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".txt": "text"}
_PICTURES = {".png", ".svg", ".jpg"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file of the repository that a page, or an added page, links to."""
    waiting = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
    for file in files.documentation_pages():
        waiting += _targets(file.content_string, f"{DOCS}/{file.src_uri}")
    added: set[str] = set()
    while waiting:
        name = waiting.pop()
        path = REPOSITORY / name
        if name in added or name.startswith(f"{DOCS}/") or not path.exists():
            continue  # a page that is missing is reported by the strict build
        added.add(name)
        uri = _page_of(name)
        if uri != name and files.get_file_from_path(uri):
            continue  # the site has a page of its own in its place
        if path.suffix in _PICTURES:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        else:
            text = _as_page(path)
            page = File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(page)
            if path.suffix == ".md":
                waiting += _targets(text, name)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to the repository's files, led to their pages."""
    here = page.file.src_uri
    origin = _origin(here)

    def led(found: re.Match[str]) -> str:
        name = _resolved(found[0], origin)
        if name is None:
            return found[0]
        target = name.removeprefix(f"{DOCS}/") if name.startswith(f"{DOCS}/") else _page_of(name)
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return _replace_links(markdown, led)


def _replace_links(markdown: str, replacement: Callable[[re.Match[str]], str]) -> str:
    """`markdown` with each link outside code replaced."""
    pieces, start = [], 0
    for code in _CODE.finditer(markdown):
        pieces += [_LINK.sub(replacement, markdown[start : code.start()]), code[0]]
        start = code.end()
    return "".join([*pieces, _LINK.sub(replacement, markdown[start:])])


def _targets(markdown: str, origin: str) -> list[str]:
    """The repository's files that a page links to."""
    names: list[str] = []

    def collect(found: re.Match[str]) -> str:
        name = _resolved(found[0], origin)
        names.extend([name] if name else [])
        return found[0]

    _replace_links(markdown, collect)
    return names


def _resolved(link: str, origin: str) -> str | None:
    """The path in the repository that a link in the file `origin` leads to; None outside it."""
    name = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return None if name.startswith("..") else name


def _page_of(name: str) -> str:
    """Where the site has the repository's file or folder `name`."""
    path = REPOSITORY / name
    if path.is_dir():
        return f"{name}/index.md" if not (path / "README.md").is_file() else f"{name}/README.md"
    if path.suffix == ".md" or path.suffix in _PICTURES:
        return _PAGES.get(name, name)
    return f"{name}.md"


def _origin(uri: str) -> str:
    """Where the page at `uri` lies in the repository."""
    for name, page in _PAGES.items():
        if uri == page and not (REPOSITORY / DOCS / uri).is_file():
            return name
    return f"{DOCS}/{uri}" if (REPOSITORY / DOCS / uri).is_file() else uri


def _as_page(path: Path) -> str:
    name = path.relative_to(REPOSITORY).as_posix()
    if path.is_dir():
        readme = path / "README.md"
        if readme.is_file():
            return readme.read_text(encoding="utf-8")
        entries = [
            f"- `{entry.name}{'/' if entry.is_dir() else ''}`"
            for entry in sorted(path.iterdir())
            if not entry.name.startswith((".", "__"))
        ]
        return "\n".join([f"# {name}", "", *entries, ""])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    language = _SOURCE.get(path.suffix, "text")
    return f"# {name}\n\n````{language}\n{text}````\n"
