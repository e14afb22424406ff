"""The picture: well-formed, escaped, and what the document says, in its places."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rim_peft.inspection import Inspection, render_picture
from rim_peft.inspection.signals import read_signals
from tests.unit.inspection.inspection_document import EVIL, NUM_LAYERS, evil_inspection, inspection, question

SVG = "{http://www.w3.org/2000/svg}"
COMMITTED = Path(__file__).parents[3] / "docs" / "mind.svg"


def draw(document: Inspection) -> Any:
    return ElementTree.fromstring(render_picture(document, document.questions[0]))  # noqa: S314


def texts(picture: Any, kind: str) -> list[str]:
    return [element.text for element in picture.iter(f"{SVG}text") if kind in element.get("class").split()]


def test_it_shows_what_each_block_held_and_in_which_layer_it_came_up() -> None:
    document = inspection(question("red", "green", "green"))
    picture = draw(document)
    assert texts(picture, "held") == ["red", "green", "green"]
    # Four cells in each column begin with the block's own colour, or the last block's; the two below hold another.
    kinds = [cell.get("class").split()[1] for cell in picture.iter(f"{SVG}rect") if "cell" in cell.get("class")]
    column = NUM_LAYERS // 2
    assert kinds == [*["other"] * column, *["own"] * column] + [*["other"] * column, *["answer"] * column] * 2
    # A token is named where it comes up.
    named = [text for text in texts(picture, "small") if not text.startswith("layer")]
    assert named == ["plum", "red"] + ["plum", "green"] * 2
    told = [signal.text for signal in read_signals(document.questions[0]) if signal.supports is not None]
    assert [element.text for element in picture.iter(f"{SVG}text") if element.text in told] == told


def test_without_a_map_the_rest_is_shown() -> None:
    picture = draw(inspection(question("red", "green", lens=None, missing={"lens": "why not"})))
    assert texts(picture, "held") == ["red", "green"]
    assert not [cell for cell in picture.iter(f"{SVG}rect") if "cell" in cell.get("class")]


def test_hostile_texts_are_text() -> None:
    document = evil_inspection()
    text = render_picture(document, document.questions[0])
    picture = draw(document)
    assert {element.tag.removeprefix(SVG) for element in picture.iter()} <= {
        *("svg", "title", "desc", "style", "rect", "g", "text", "path", "circle")
    }
    for element in picture.iter():
        assert not [name for name in element.attrib if name.startswith("on") or name.endswith("href")]
    assert not re.search(r"[\x1b\u202e\u2066\ud83d]|<script|<img|url\(", text)
    assert EVIL[:20] in "".join(texts(picture, "asked"))
    longest = max(len(element.text or "") for element in picture.iter(f"{SVG}text"))
    assert longest <= 115  # a line, not the very long word


@pytest.mark.parametrize(("num_blocks", "width"), [(2, 960), (16, 1888)])
def test_many_blocks_make_it_wider(num_blocks: int, width: int) -> None:
    document = inspection(question(*["red"] * num_blocks))
    assert draw(replace(document, num_blocks=num_blocks)).get("width") == f"{width}"


def test_the_one_in_the_repository_is_of_this_version() -> None:
    """Its look, and its four blocks; whether the adapter still holds that is tested with the base."""
    text = COMMITTED.read_text(encoding="utf-8")
    (style,) = re.findall(r"<style>.*?</style>", text, re.DOTALL)
    document = inspection(question("red"))
    assert style in render_picture(document, document.questions[0])
    assert texts(ElementTree.fromstring(text), "held") == ["green", "plum", "gold", "red"]  # noqa: S314
