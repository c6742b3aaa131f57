"""The page: self-contained, well-formed, and with the known numbers of known runs."""

import html
import re
import shlex
from html.parser import HTMLParser

import pytest

from mhc_lightning.errors import UserError
from mhc_lightning.reporting.report import make_report
from mhc_lightning.reporting.report_folder import write_report

VOID = {"meta", "link", "img", "br", "hr", "input", "image", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps what tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), list(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), list(self.open)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open[-1:]:
            self.text.append(data)

    def named(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    report = make_report([str(runs / name) for name in ("residual", "hc", "mhc", "foreign")])
    folder = tmp_path_factory.mktemp("report")
    assert write_report(report, folder) == folder / "index.html"
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_the_page_needs_nothing_else_and_runs_nothing(source, page):
    assert not page.named("script") and not page.named("link") and not page.named("iframe")
    for _, attributes, _ in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), key
            if key in ("src", "href", "xlink:href", "srcset"):
                assert value.startswith(("data:image/png;base64,", "#")), value
    assert "@import" not in source
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", source))
    assert "http://" not in source and "https://" not in source


def test_its_parts_are_named_and_linked(page):
    (root,) = page.named("html")
    assert root["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in (
        page.named("meta")
    )
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in page.elements:
        wanted = [attributes["href"][1:]] if attributes.get("href", "").startswith("#") else []
        for key in ("clip-path", "style"):
            wanted += re.findall(r"url\(#([^)]*)\)", attributes.get(key, ""))
        wanted += attributes.get("aria-labelledby", "").split()
        assert set(wanted) <= set(ids), wanted
    assert len(page.named("h1")) == len(page.named("main")) == 1
    assert all(image["alt"] and image["width"] for image in page.named("img"))
    for picture in page.named("svg"):
        assert picture["role"] == "img" and picture["aria-labelledby"]
    assert all("scope" in head for head in page.named("th"))
    regions = [a for a in page.named("div") if a.get("class") == "scroll"]
    assert regions and all(a["tabindex"] == "0" and a["aria-label"] for a in regions)


def test_figures_take_their_colours_from_the_page(source):
    drawn = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    drawn = re.sub(r'href="data:[^"]*"', "", drawn)
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", drawn)) <= {"#000000"}
    for name in set(re.findall(r"var\(--([\w-]+)\)", source)) - {"run"}:
        assert f"--{name}:" in source, name
    assert "prefers-color-scheme: dark" in source
    assert "font-family: 'DejaVu" not in source


def rows(source, heading):
    section = source.split(f">{heading}</h2>")[1].split("</section>")[0]
    found = []
    for row in re.findall(r"<tr>(.*?)</tr>", section, flags=re.DOTALL)[1:]:
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)
        found.append([re.sub(r"<[^>]+>", " ", cell).split() for cell in cells])
    return {" ".join(first): [" ".join(cell) for cell in rest] for first, *rest in found}


def test_the_table_has_the_known_numbers(source):
    table = rows(source, "Numbers")
    assert list(table) == ["residual", "hc", "mhc", "foreign"]
    residual, hc, mhc, foreign = table.values()
    assert residual[1:] == [
        "3.0000 step 1,000", "baseline", "1 always", "1 always", "1 always", "1 always",
        "0.500, 0.500 step 10", "1,505", "1.0 GiB",
    ]  # fmt: skip
    assert hc[3:7] == [
        "1 always", "41 step 900 sub-layers 38 to 44", "1 always", "1 always",
    ]  # fmt: skip
    assert hc[2].startswith("−0.0") and "validation −0.0100" in hc[2]
    assert "steps 610 to 800" in mhc[0] and mhc[1] == "not logged"
    assert foreign[3:] == ["not logged"] * 7
    (text,) = re.findall(r"<p[^>]*>([^<]*foreign and residual[^<]*)", source)
    assert "not known" in text


def test_what_differs_is_in_a_table_and_the_rest_is_said_once(source, page):
    table = rows(source, "What was run")
    assert table["Connection"] == [
        "ResidualConnection", "HyperConnection", "ManifoldHyperConnection",
    ]  # fmt: skip
    assert table["Streams"] == ["1", "4", "4"]
    assert "<dt>Parameters</dt><dd>1,234,567</dd>" in source
    assert "Of foreign only the logged metrics are known" in source
    assert not any("output_dir" in key or "logger" in key for key in table)


def test_commands_can_be_typed_again(source, runs):
    section = source.split(">How to reproduce</h2>")[1].split("</section>")[0]
    commands = re.findall(r"<code>(.*?)</code>", section)
    assert len(commands) == 3 and "No command was recorded" in section
    words = shlex.split(html.unescape(commands[1]))
    assert words == [
        *("python", "-m", "mhc_lightning", "fit", "--config", "mhc_quickstart"),
        *("connection=hc", "seed=1", f"output_dir={runs / 'hc'}_again"),
    ]
    assert "Commit 0123456789ab, with uncommitted changes." in section


def test_names_are_text_and_never_markup(tmp_path, write):
    write.table(tmp_path / "<b>&\"'", {"train/loss": {1: 1.0, 2: 0.5}})
    source = write_report(make_report([str(tmp_path)]), tmp_path / "out").read_text()
    assert '<b>&"' not in source and "&lt;b&gt;&amp;" in source
    Page(source)


def test_of_many_matrices_the_products_and_some_layers_are_shown(tmp_path, write):
    names = [*(f"layer_{k}" for k in range(30)), "composite_0_to_14", "composite_0_to_29"]
    write.events(tmp_path, {"train/loss": {1: 1.0}}, pictures=names)
    source = write_report(make_report([str(tmp_path)]), tmp_path / "out").read_text()
    shown = re.findall(r'alt="Heat map of the residual matrix of [^,]*, ([^,]*), at', source)
    layers = [f"layer {k}" for k in range(0, 30, 3)]
    assert shown == [*layers, "composite 0 to 14", "composite 0 to 29"]
    assert "20 more were logged" in source


def test_figures_lie_beside_the_page_and_replace_those_of_an_earlier_one(folder, runs, tmp_path):
    names = sorted(file.name for file in (folder / "figures").iterdir())
    assert {"loss.png", "loss_gap.png", "gradient_norm.png", "gain_composite_backward.png",
            "gain_composite_backward_by_layer.png", "sinkhorn_column.png",
            "gain_composite_backward_over_time_1.png"} <= set(names)  # fmt: skip
    assert not any("over_time_0" in name or "forward_over_time" in name for name in names)
    for file in (folder / "figures").iterdir():
        assert file.read_bytes().startswith(b"\x89PNG")
    report = make_report([str(runs / "foreign")])
    write_report(report, tmp_path)
    (tmp_path / "figures/old.png").write_bytes(b"")
    write_report(report, tmp_path)
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["loss.png"]


def test_somebody_elses_page_is_left_alone(runs, tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(UserError, match="was not written by report"):
        write_report(make_report([str(runs / "foreign")]), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]
    with pytest.raises(UserError, match="cannot be written to"):
        write_report(make_report([str(runs / "foreign")]), tmp_path / "index.html")


def test_a_long_run_makes_a_small_page(tmp_path, write):
    """A page's size follows what can be seen, not how long the run was."""
    losses = {step: 3 + (step * 7919 % 100) / 1000 for step in range(1, 8001)}
    write.table(tmp_path / "run", {"train/loss": losses})
    page = write_report(make_report([str(tmp_path / "run")]), tmp_path / "page")
    assert page.stat().st_size < 100_000
