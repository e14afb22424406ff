"""The page in a browser; contrast by axe-core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rim_peft.inspection import render_page, render_picture
from tests.browser import PHONE, WIDE, Page, assert_policy_holds, faults, needs_browser
from tests.unit.inspection.inspection_document import evil_inspection, inspection, question

pytestmark = needs_browser


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    documents = {
        "good": inspection(question("red", "green", "green"), question("blue", "red", "blue")),
        "evil": evil_inspection(),
    }
    for name, document in documents.items():
        (folder / f"{name}.html").write_text(
            render_page(document, remarks=["Right: “<b>red</b>”.", "Wrong."]), encoding="utf-8"
        )
    return {name: folder / f"{name}.html" for name in documents}


@pytest.mark.parametrize("name", ["good", "evil"])
@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (WIDE, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_it_fits_is_quiet_and_has_contrast(
    browser: Any, files: dict[str, Path], name: str, size: tuple[int, int], scheme: str
) -> None:
    shown = Page(browser, files[name], size, scheme)
    shown.assert_fits()
    shown.page.close()


def test_axe_sees_faint_words_under_the_policy(browser: Any, files: dict[str, Path]) -> None:
    shown = Page(browser, files["good"], WIDE)
    shown.page.locator("h1").evaluate("heading => heading.style.setProperty('color', '#eeeeee')")
    (fault,) = faults(shown.page)
    assert fault.startswith("color-contrast: <h1 ")
    shown.page.close()


@pytest.mark.parametrize("javascript", [True, False])
def test_a_click_and_the_keyboard_choose_what_is_shown(browser: Any, files: dict[str, Path], javascript: bool) -> None:
    shown = Page(browser, files["good"], WIDE, java_script_enabled=javascript)
    page = shown.page
    maps = page.locator(".question").first.locator(".map")
    assert [maps.nth(index).is_visible() for index in range(3)] == [True, False, False]
    page.get_by_label("its memory token 2").first.click()
    assert [maps.nth(index).is_visible() for index in range(3)] == [False, False, True]
    page.keyboard.press("ArrowUp")
    assert [maps.nth(index).is_visible() for index in range(3)] == [False, True, False]
    # The other question keeps its own choice.
    assert page.locator(".question").nth(1).locator(".map").first.is_visible()
    looks = page.locator(".question").first.locator(".looks")
    page.get_by_label("upper third").first.check()
    assert [looks.nth(index).is_visible() for index in range(4)] == [False, False, False, True]
    table = page.get_by_text("Tokens of block 1's readout").first
    assert not table.is_visible()
    page.locator("summary", has_text="Block 1: red").first.focus()
    page.keyboard.press("Enter")
    assert table.is_visible()
    page.get_by_role("link").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.url.endswith("#q2")
    assert shown.noise == []
    page.close()


def test_the_keyboard_reaches_everything_in_order(browser: Any, files: dict[str, Path]) -> None:
    shown = Page(browser, files["good"], WIDE)
    reached = []
    for _ in range(40):
        shown.page.keyboard.press("Tab")
        reached.append(shown.page.evaluate("document.activeElement.tagName + (document.activeElement.name || '')"))
    assert reached[:3] == ["A", "A", "INPUTplace1"]
    for name in ("INPUTplace1", "INPUTlayers1", "SUMMARY", "DIV", "PRE", "INPUTplace2"):
        assert name in reached
    shown.page.locator("summary").first.focus()
    assert shown.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    shown.page.close()


def test_the_policy_stops_a_script(browser: Any, files: dict[str, Path]) -> None:
    assert_policy_holds(browser, files["good"], "How outputs/demo thinks")


@pytest.mark.parametrize("name", ["good", "evil"])
def test_a_picture_is_drawn_and_keeps_to_its_frame(browser: Any, tmp_path: Path, name: str) -> None:
    document = evil_inspection() if name == "evil" else inspection(question("red", "green", "green"))
    (tmp_path / "picture.svg").write_text(render_picture(document, document.questions[0]), encoding="utf-8")
    (tmp_path / "page.html").write_text('<!doctype html><img src="picture.svg" alt="">', encoding="utf-8")
    page = browser.new_page(viewport={"width": WIDE[0], "height": WIDE[1]})
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate("document.querySelector('img').naturalWidth") > 0
    page.goto((tmp_path / "picture.svg").as_uri())
    frame = page.locator("rect.paper").bounding_box()
    for box in (text.bounding_box() for text in page.locator("text").all()):
        if name == "good":  # very long words are cut by their column or by the frame
            assert box["x"] >= frame["x"]
            assert box["x"] + box["width"] <= frame["x"] + frame["width"]
        assert box["y"] + box["height"] <= frame["y"] + frame["height"]
    page.close()
