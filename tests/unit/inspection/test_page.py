"""The page and the short form: well-formed, escaped, accessible, without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rim_peft.escaping import json_text
from rim_peft.inspection import Inspection, render_page, render_text
from rim_peft.inspection.evidence import _level
from rim_peft.inspection.signals import headline, read_signals
from tests.unit.comparison.test_page import Tree
from tests.unit.inspection.inspection_document import EVIL, evil_inspection, inspection, question, readout


def parse(page: str) -> Tree:
    tree = Tree()
    tree.feed(re.sub(r"<(rect [^>]*)/>", r"<\1></rect>", page))
    tree.close()
    assert tree.open == []
    return tree


def _two() -> Inspection:
    return inspection(question("red", "green", "green"), question("blue", "red", "blue"))


@pytest.mark.parametrize("document", [_two(), evil_inspection()])
def test_the_page_needs_nothing_else_and_says_so(document: Inspection) -> None:
    page = render_page(document)
    tree = parse(page)
    assert {tag for tag, _ in tree.tags} & {"script", "link", "iframe", "object", "form", "img"} == set()
    for tag, attributes in tree.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "action")], tag
    assert all(str(link["href"]).startswith("#q") for link in tree.of("a"))
    policy = next(meta["content"] for meta in tree.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"https?:", page)
    page.encode("utf-8")


def test_hostile_texts_are_text() -> None:
    page = render_page(evil_inspection())
    for character in ("\x1b", "\u202e", "\u2066", "\ud83d"):
        assert character not in page
    assert "<img" not in page
    # Most places show it whole; those of one line cut it.
    assert page.count("&lt;script&gt;") > 20
    words = unescape(re.sub(r"<[^>]*>", "", page))
    assert words.count("w" * 300) > 15
    text = render_text(evil_inspection())
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert json.loads(json_text(evil_inspection().to_dict()))["adapter"] == EVIL


@pytest.mark.parametrize("document", [_two(), evil_inspection()])
def test_headings_and_tables_are_in_order(document: Inspection) -> None:
    tree = parse(render_page(document))
    levels = [int(tag[1]) for tag, _ in tree.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(tree.of("caption")) == len(tree.of("table")) > 0
    assert {header["scope"] for header in tree.of("th")} == {"row", "col"}
    ids = [attributes["id"] for _, attributes in tree.tags if "id" in attributes]
    assert ids == ["q1", "q2"]


def test_everything_of_every_question_is_in_the_page_without_a_click() -> None:
    document = _two()
    words = unescape(re.sub(r"<[^>]*>", "", render_page(document)))
    for shown in document.questions:
        for text in (headline(shown), *(signal.text for signal in read_signals(shown))):
            assert text in words
        assert str(shown.chain and shown.chain.text) in words
    page = render_page(document)
    assert page.count('class="map"') == 2 * 3
    assert page.count("<dt>") == 2 * 3 * len(document.layer_groups)
    radios = [radio for radio in parse(page).of("input") if "checked" in radio]
    assert [radio["name"] for radio in radios] == ["place1", "layers1", "place2", "layers2"]


def test_remarks_are_at_their_questions_and_in_the_contents_as_text() -> None:
    page = render_page(_two(), remarks=["Wrong: “<b>”.", "Right."])
    contents, first, second = re.split(r"(?=<article )", page)
    for part, told in ((first, "Wrong: “&lt;b&gt;”."), (second, "Right.")):
        assert f'<p class="remark"><bdi>{told}</bdi></p>' in part
        assert contents.count(f"<bdi>{told}</bdi></li>") == 1
    assert "remark" not in render_page(_two()).split("<body>")[1]


def test_the_map_marks_the_answer_and_the_blocks_own_readout() -> None:
    page = render_page(inspection(question("red", "green")))
    (first, *_) = re.findall(r"<tbody>(.*?)</tbody>", page, re.DOTALL)
    kinds = [re.findall(r'<td class="(\w+)', row) for row in first.strip().splitlines()]
    assert kinds == [["own", "answer"]] * 3 + [["other", "other"]] * 3
    assert re.findall(r'scope="row">(\d)<', first) == ["6", "5", "4", "3", "2", "1"]


def test_a_chat_shows_its_last_message_and_missing_parts_their_reasons() -> None:
    asked = [{"role": "user", "content": "first"}, {"role": "user", "content": "second?"}]
    found = question(
        "red", asked=asked, lens=None, attention=None, chain=None, alternatives=(), missing={"lens": "why not"}
    )
    page = render_page(inspection(found))
    assert '<h2 id="q1" dir="auto">second?</h2>' in page
    assert "Not shown: why not" in page
    assert page.count("no reason is known") == 4
    assert "What the base writes instead" not in page


def test_levels_follow_shares() -> None:
    assert [_level(share) for share in (-1.0, 0.0, 0.05, 0.5, 1.0, 9.0)] == [0, 0, 0, 4, 8, 8]


def test_signs_for_and_against() -> None:
    told = {signal.text: signal.supports for signal in read_signals(question("red", "green", "green"))}
    assert told == {
        "Its probability is 80 %.": None,
        "It stays the same from block 2 to block 3.": True,
        "Without its blocks it gives “red” (60 %): the blocks decide.": True,
        "With its blocks' tokens shuffled it gives the same answer, “green” (50 %).": None,
        "With another question's blocks it gives that question's answer, “plum” (70 %).": True,
        "The base, writing 12 tokens, ends in the same answer.": True,
    }
    again = question("green", "red", "green")
    assert headline(again) == "Held only after the last block, 3."
    assert "Block 1 held it too, but not the blocks up to 3: a step, or a guess given up." in {
        signal.text for signal in read_signals(again)
    }
    unsure = question("red", "red", readouts=(readout(1, "red", "red"), readout(2, "red", "red", 0.3)))
    assert [s.supports for s in read_signals(unsure)][:2] == [False, True]


def test_without_an_answer_nothing_supports_it() -> None:
    found = question("red", "green")
    nothing = replace(found, first_block=None, settled_block=None)
    assert headline(nothing) == "The last block's readout holds no answer that can be read."
    assert {signal.supports for signal in read_signals(nothing)} == {False, None}


def test_the_short_form() -> None:
    lines = render_text(inspection(question("red", "green", "green", missing={"probe": "too wide"}))).splitlines()
    assert lines[0] == "<bos> Tom boils Kim's brew"
    assert [line.split() for line in lines[2:5]] == [
        ["block", "1", "red", "80", "%"],
        ["block", "2", "green", "80", "%", "<-", "the", "answer,", "from", "here", "on"],
        ["block", "3", "green", "80", "%"],
    ]
    assert lines[6] == "answer “green”. Held from block 2 on. Of 6 signs 4 support it, none speaks against it."
    assert "not shown: probe (too wide)" in lines
    assert lines[-1] == "time: 80 ms for 2 tokens after the blocks, 2400 ms for 12 tokens written by the base"


def test_the_docs_name_every_field_of_the_document() -> None:
    text = (Path(__file__).parents[3] / "docs" / "records.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    document = inspection(question("red")).to_dict()

    def fields(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(fields, value))
        return {*value, *set().union(*map(fields, value.values()))} if isinstance(value, dict) else set()

    assert fields(document) - named == set()
