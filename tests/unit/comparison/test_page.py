"""The report as one HTML page: well-formed, accessible, escaped, and on its own."""

from __future__ import annotations

import base64
import hashlib
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rim_peft.comparison.plots import Plot
from rim_peft.comparison.report import render_markdown, render_page
from rim_peft.comparison.report.assembly import build_report
from rim_peft.comparison.report.content import Table
from tests.unit.comparison.results_document import ablate_document, bare_document, compare_document

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Tree(HTMLParser):
    """Checks that tags close in order, and keeps every tag with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def parse(page: str) -> Tree:
    tree = Tree()
    tree.feed(page)
    tree.close()
    assert tree.open == []
    return tree


@pytest.fixture
def plot(tmp_path: Path) -> Plot:
    plot = Plot("accuracy", "Accuracy", 'Share of "right" answers.', "result", tmp_path / "plots")
    plot.folder.mkdir()
    plot.svg.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", encoding="utf-8")
    return plot


def test_the_page_is_well_formed_and_needs_nothing_else(plot: Plot) -> None:
    tree = parse(render_page(compare_document(), [plot]))
    assert tree.of("link") == tree.of("iframe") == []
    assert tree.of("script") == [{}]
    assert all(str(link["href"]).startswith("#") for link in tree.of("a"))
    (image,) = tree.of("img")
    assert image["alt"] == 'Share of "right" answers.'
    kind, data = str(image["src"]).split(",")
    assert kind == "data:image/svg+xml;base64"
    assert base64.b64decode(data) == plot.svg.read_bytes()


def test_the_policy_allows_its_own_style_and_script_alone(plot: Plot) -> None:
    page = render_page(compare_document(), [plot])
    (policy,) = [m["content"] for m in parse(page).of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    hashes = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL)
    }
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def test_a_plot_is_beside_its_table(plot: Plot) -> None:
    pair = r'<div class="pair">\n<figure>.*</figure>\n<div class="box".*</table>\n</div>\n</div>'
    assert re.search(pair, render_page(compare_document(), [plot]).split("</section>")[0], re.DOTALL)


def test_the_page_of_questions_is_linked_and_its_address_is_no_markup() -> None:
    page = render_page(compare_document(), [], questions='runs/"><img/questions.html')
    (link,) = [link["href"] for link in parse(page).of("a") if not str(link["href"]).startswith("#")]
    assert link == "runs/%22%3E%3Cimg/questions.html"


def test_links_lead_to_headings_and_headings_are_in_order(plot: Plot) -> None:
    tree = parse(render_page(compare_document(), [plot]))
    anchors = [heading["id"] for heading in tree.of("h2")]
    # The result is on top, so the contents begin after it.
    assert [link["href"] for link in tree.of("a")] == [f"#{anchor}" for anchor in anchors[1:]]
    assert (anchors[0], anchors[-1]) == ("result", "what-was-compared")
    assert len(set(anchors)) == len(anchors)
    assert len(tree.of("h1")) == 1


def test_keys_that_differ_in_signs_alone_have_links_of_their_own() -> None:
    document = ablate_document()
    for method, key in zip(document["methods"][1:3], ("a.b", "a_b"), strict=True):
        method["changes"] = {key: 1}
    anchors = [heading["id"] for heading in parse(render_page(document, [])).of("h2")]
    assert "changed-a-b" in anchors
    assert len(set(anchors)) == len(anchors)


def test_headers_of_tables_have_a_scope(plot: Plot) -> None:
    tree = parse(render_page(compare_document(), [plot]))
    assert {header["scope"] for header in tree.of("th")} == {"row", "col"}
    assert len(tree.of("caption")) == len(tree.of("table"))


def test_page_and_markdown_hold_the_same(plot: Plot) -> None:
    page = unescape(re.sub(r"<[^>]*>", "", render_page(compare_document(), [plot])))
    text = re.sub(r"\\(.)", r"\1", render_markdown(compare_document(), [plot]))
    tables = [part for s in build_report(compare_document()).sections for part in s.parts if isinstance(part, Table)]
    assert len(tables) == 19
    for table in tables:
        for words in (*(cell for row in table.rows for cell in row), *table.notes):
            assert words in page
            assert " ".join(words.split()) in text


def test_nothing_of_the_document_becomes_markup(plot: Plot) -> None:
    evil = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
    document = compare_document()
    document["name"] = document["task"]["name"] = document["base"]["name"] = evil
    document["command"] = ["rim-peft", evil]
    document["hardware"]["cpu"] = document["versions"]["torch"] = evil
    document["methods"][-1]["label"] = document["methods"][0]["label"] = evil
    document["methods"][1]["changes"] = {evil: evil}
    for run in document["runs"]:
        run["folder"] = evil
        for control in run["controls"] or ():
            control["name"] = control["description"] = evil
    page = render_page(document, [plot])
    tree = parse(page)
    assert page.count("<script") == 1
    assert len(tree.of("img")) == 1
    assert all(not name.startswith("on") for _, attributes in tree.tags for name in attributes)


def test_a_page_without_plots_says_so() -> None:
    page = render_page(bare_document(), [])
    assert "<p>None were drawn.</p>" in page
    assert "<li>Latency: not measured.</li>" in page
    parse(page)
